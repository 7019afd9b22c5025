"""Two gloo processes that train the tiny model in every way in which a model can be spread.

Each scenario leaves a JSON file and the adapter that it saved; the tests compare them with one
process. The batches of the two processes together are those of `batches()`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import accelerate.utils.fsdp_utils
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import grasp_kernels as gk
from grasp_kernels import processes
from grasp_kernels.models import sharding
from grasp_kernels.models.architectures import model_gains, model_sites
from grasp_kernels.models.checkpoint import load_model
from tests.helpers.models import tiny_model, tiny_peft_model
from tests.helpers.oracle import orthonormal, relative_error

STEPS = 6
TIMEOUT = 300.0  # seconds for all scenarios together; half a minute is normal


def start(scenarios: list[str], folder: Path) -> None:
    """Run scenarios by name, each leaving `NAME.json` in `folder`, on two processes."""
    context = mp.spawn(_process, (scenarios, folder), nprocs=2, join=False)
    try:
        if not context.join(timeout=TIMEOUT) and not context.join(timeout=TIMEOUT):
            raise TimeoutError(f"the processes hang: {sorted(folder.iterdir())} are done")
    finally:
        for process in context.processes:
            process.kill()


def batches() -> Tensor:
    """Token ids `[STEPS, 4, 9]`."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 64, (STEPS, 4, 9), generator=generator)


def model_and_subspace() -> tuple[Any, gk.Subspace]:
    model = tiny_peft_model()
    directions = orthonormal(32, 2, torch.Generator().manual_seed(3))
    return model, gk.Subspace(directions, model_gains(model, model_sites(model)))


def frozen_A_and_regularizer() -> tuple[Any, gk.Subspace, gk.KLRegularizer]:
    """An adapter whose A is frozen and whose B starts at zero, and a divergence."""
    model, subspace = model_and_subspace()
    generator = torch.Generator().manual_seed(11)
    for layer in (m for m in model.modules() if hasattr(m, "lora_A")):
        layer.lora_B["default"].weight.data.zero_()
        layer.lora_A["default"].weight.requires_grad_(False)
    documents = torch.randint(0, 64, (8, 9), generator=generator)
    counted = torch.rand(documents.shape, generator=generator) < 0.8
    return (
        model,
        subspace,
        gk.KLRegularizer.of(model, documents, counted, kl_coef=1.0, batch_size=3),
    )


def train(
    model: Any,
    ids: Tensor,
    sync: Callable[[], Any] | None = None,
    parts: int = 1,
    penalty: Callable[[Any, int], Tensor] | None = None,
) -> list[float]:
    """The losses of AdamW steps on `ids[steps, batch, length]`, each in so many parts."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    losses = []
    for step, batch in enumerate(ids):
        optimizer.zero_grad()
        total = 0.0
        for i, part in enumerate(batch.chunk(parts)):
            with sync() if sync is not None and i + 1 < parts else nullcontext():
                loss = model(input_ids=part, labels=part).loss / parts
                if penalty is not None:
                    loss = loss + penalty(model, step)
                loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses


def _process(rank: int, scenarios: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})  # accelerate asks
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mine = batches()[:, 2 * rank : 2 * rank + 2]
    for name in scenarios:
        result = SCENARIOS[name](mine, folder / name)
        losses = torch.tensor(result["losses"])
        dist.all_reduce(losses)
        result["losses"] = (losses / 2).tolist()
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


def _observed(model: Any, losses: list[float], folder: Path) -> Any:
    """What a test asks of a trained model; rank 0 saves the adapter as a user would."""
    weights = _weights(model)  # asked of all ranks
    if dist.get_rank() == 0:
        # Of a model with FSDP's wrappers inside, peft 0.21 finds no layer to save.
        wrapped = hasattr(model, "_fsdp_wrapped_module")
        peft_model = tiny_peft_model() if wrapped else getattr(model, "module", model)
        peft_model.save_pretrained(folder, state_dict=weights)
    worst = max(gk.leakage(model).values())
    return {"losses": losses, "leakage": worst, "stock": sorted(_stock_reasons)}


_stock_reasons: set[str] = set()


class _Watched(gk.GraspLoRALinear):
    """Remembers why a call went to peft's forward."""

    def why_stock(self, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        reason = super().why_stock(x, *args, **kwargs)
        _stock_reasons.update({reason} if reason else ())
        return reason


def _replaced(model: Any, subspace: gk.Subspace, **options: Any) -> Any:
    _stock_reasons.clear()
    report = gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, **options))
    for module in model.modules():
        if isinstance(module, gk.GraspLoRALinear):
            module.__class__ = _Watched
    return report


def _ddp(ids: Tensor, folder: Path, parts: int = 1, **options: Any) -> Any:
    model, subspace = model_and_subspace()
    _replaced(model, subspace)
    wrapped = DistributedDataParallel(model, **options)
    losses = train(wrapped, ids[: STEPS // 2], wrapped.no_sync, parts)
    return _observed(wrapped, losses, folder)


def _ddp_saving_on_the_way(ids: Tensor, folder: Path) -> Any:
    """Rank 0 alone saves in the middle of a training."""
    model, subspace = model_and_subspace()
    _replaced(model, subspace)
    wrapped = DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    losses = []
    for batch in ids:
        optimizer.zero_grad()
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
    return _observed(wrapped, losses, folder)


def _two_forwards_of_ddp(ids: Tensor, folder: Path) -> Any:
    """As for a pair of answers: both forwards come before the backward."""
    model, subspace = model_and_subspace()
    _replaced(model, subspace)
    wrapped = DistributedDataParallel(model)
    model.zero_grad()
    halves = [wrapped(input_ids=part, labels=part).loss / 2 for part in ids[0].chunk(2)]
    sum(halves).backward()
    return _observed(wrapped, [float(sum(halves))], folder)


def _as_run_retrains(
    ids: Tensor, folder: Path, spread: Callable[[Any], Any] = DistributedDataParallel
) -> Any:
    """Train with A frozen, and a second forward for the divergence."""
    model, subspace, regularizer = frozen_A_and_regularizer()
    _replaced(model, subspace)
    wrapped = spread(model)
    losses = train(wrapped, ids, penalty=regularizer.loss)
    result = _observed(wrapped, losses, folder)
    free = [name for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name]
    return {**result, "free": free}


def _accelerate(ids: Tensor, folder: Path) -> Any:
    from accelerate import Accelerator

    model, subspace = model_and_subspace()
    _replaced(model, subspace)
    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare(model)
    losses = train(wrapped, ids)
    return _observed(wrapped, losses, folder)


def _shard(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model.get_base_model().model.layers:
        fully_shard(block)
    return fully_shard(model)


def _sharded_by_accelerate(model: Any) -> Any:
    """`accelerate` as it shards on GPUs; it has no FSDP for CPUs."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def _fsdp2(
    ids: Tensor,
    folder: Path,
    shard: Callable[[Any], Any] = _shard,
    replaced_later: bool = False,
    reentrant: bool | None = None,
) -> Any:
    model, subspace = model_and_subspace()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    if replaced_later:
        model = shard(model)
        report = _replaced(model, subspace)
    else:
        report = _replaced(model, subspace)
        model = shard(model)
    losses = train(model, ids)
    result = _observed(model, losses, folder)
    kinds = sorted({type(p).__name__ for p in model.parameters()})
    return {**result, "fallbacks": report.fallbacks, "parameters": kinds}


def _fsdp2_afterwards(ids: Tensor, folder: Path) -> Any:
    """What one does with a trained model without gathering it as a whole."""
    model, subspace = model_and_subspace()
    _replaced(model, subspace)
    model = _shard(model)
    losses = train(model, ids[:2])
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder / "pytorch_model_fsdp_0")
    identified = gk.identify(model, k=1)
    result = _observed(model, losses, folder)
    gk.remove_grasp(model)
    if dist.get_rank() == 0:
        identified.save(folder / "subspace.safetensors")
    return result


def _shard_leaves(model: Any) -> Any:
    """As FSDP wraps under peft's own policy: every trained layer is a unit of its own."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            fully_shard(module)
    return _shard(model)


def _wrap(model: Any) -> Any:
    """As `accelerate` wraps under FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    blocks = ModuleWrapPolicy({type(model.get_base_model().model.layers[0])})
    return FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=blocks, device_id=torch.device("cpu")
    )


def _weights(wrapped: Any) -> dict[str, Tensor]:
    """Whole weights, of FSDP1 on rank 0 alone; without the wrapper's name before theirs."""
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    if isinstance(wrapped, FSDP):
        whole = FullStateDictConfig(rank0_only=True)
        with FSDP.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, whole):
            return wrapped.state_dict()
    if isinstance(wrapped, DistributedDataParallel):
        return wrapped.module.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(wrapped, options=options)


def _fsdp1(ids: Tensor, folder: Path) -> Any:
    model, subspace = model_and_subspace()
    _replaced(model, subspace)
    wrapped = _wrap(model)
    losses = train(wrapped, ids)
    result = _observed(wrapped, losses, folder)
    refused = {
        "replace": _refused(lambda: gk.apply_grasp(wrapped, gk.GraspConfig(subspace=subspace))),
        "restore": _refused(lambda: gk.remove_grasp(wrapped)),
    }
    identified = gk.identify(wrapped, k=1)
    if dist.get_rank() == 0:
        identified.save(folder / "subspace.safetensors")
    return {**result, "refused": refused}


def _split_loading(ids: Tensor, folder: Path) -> Any:
    """What `run` loads where the launcher asks for FSDP2, next to the whole model."""
    from torch.distributed.fsdp import FSDPModule
    from transformers import GPT2Config, LlamaConfig

    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    own = ids[0] if dist.get_rank() == 0 else ids[0, :1, :5]
    found: dict[str, Any] = {}
    with patch.dict(os.environ, asked), torch.no_grad():
        for kind in (LlamaConfig, GPT2Config):
            place = folder / kind.model_type
            if dist.get_rank() == 0:
                tiny_model(kind, tie_word_embeddings=True).save_pretrained(place)
            dist.barrier()
            whole = load_model(place, where=torch.device("cpu"))
            with processes.joined():
                parts = load_model(place)
            here = sum(sharding.local_part(p).numel() for p in parts.parameters())
            size = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            size["max_new_tokens"] = 3 + 4 * dist.get_rank()
            answers, expected = (m.generate(own, **size) for m in (parts, whole))
            blocks = [type(m).__name__ for m in parts.modules() if isinstance(m, FSDPModule)]
            found[kind.model_type] = {
                "error": relative_error(parts(input_ids=own).logits, whole(input_ids=own).logits),
                "same answers": torch.equal(answers, expected),
                "part": here / whole.num_parameters(),
                "blocks": sum(name.endswith(("DecoderLayer", "GPT2Block")) for name in blocks),
            }
    return {"losses": [0.0], "found": found}


def _refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


SCENARIOS: dict[str, Callable[[Tensor, Path], Any]] = {
    "ddp": _ddp_saving_on_the_way,
    "ddp_parts": partial(_ddp, parts=2),
    "ddp_static_graph": partial(_ddp, static_graph=True),
    "ddp_unused": partial(_ddp, find_unused_parameters=True),
    "ddp_two_forwards": _two_forwards_of_ddp,
    "accelerate": _accelerate,
    "ddp_as_run": _as_run_retrains,
    "fsdp2_as_run": partial(_as_run_retrains, spread=_shard),
    "fsdp1_as_run": partial(_as_run_retrains, spread=_wrap),
    "fsdp2": _fsdp2,
    "fsdp2_replaced_later": partial(_fsdp2, replaced_later=True),
    "fsdp2_accelerate": partial(_fsdp2, shard=_sharded_by_accelerate),
    "fsdp2_checkpointing": partial(_fsdp2, reentrant=False),
    "fsdp2_reentrant": partial(_fsdp2, reentrant=True),
    "fsdp2_afterwards": _fsdp2_afterwards,
    "fsdp2_leaves": partial(_fsdp2, shard=_shard_leaves),
    "fsdp1": _fsdp1,
    "split_loading": _split_loading,
}
if not hasattr(accelerate.utils.fsdp_utils, "fsdp2_prepare_model"):  # before accelerate 1.6
    del SCENARIOS["fsdp2_accelerate"]
if not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):  # an older transformers
    del SCENARIOS["split_loading"]
