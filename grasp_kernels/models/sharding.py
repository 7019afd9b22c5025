"""Weights of a model spread over several processes.

FSDP2 and tensor parallelism keep a weight as a DTensor: any process can get its rows from the
others. FSDP and ZeRO-3 of DeepSpeed keep a flat slice of a weight, perhaps empty, outside of their
own contexts. Inside the forward of a unit wrapped by FSDP, every weight is a whole tensor.
"""

import gc
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from grasp_kernels import processes


def is_sharded(weight: Tensor) -> bool:
    """Say whether a weight is a DTensor."""
    return hasattr(weight, "full_tensor")


def is_slice(matrix: Tensor) -> bool:
    """Say whether a matrix is here as a flat slice."""
    return matrix.dim() == 1


def is_away(matrix: Tensor) -> bool:
    """Say whether a matrix is a flat slice here, or a view of memory freed by FSDP."""
    if is_slice(matrix):
        return True
    return not is_sharded(matrix) and matrix.untyped_storage().nbytes() == 0 < matrix.numel()


def refuse_away(name: str, matrix: Tensor) -> None:
    """Raise for a matrix away from this process.

    Raises:
        ValueError: the matrix is away; the sentence names the remedy.
    """
    if not is_away(matrix):
        return
    if hasattr(matrix, "ds_id"):
        raise ValueError(
            f"{name} is partitioned by ZeRO-3 of DeepSpeed (its shape is {tuple(matrix.shape)}), "
            "which is not supported; use ZeRO-2 or FSDP2."
        )
    raise ValueError(
        f"{name} is on this process as a slice of shape {tuple(matrix.shape)}, outside of the unit "
        "that FSDP wraps; replace LoRA layers before wrapping, wrap decoder blocks rather than "
        "LoRA layers (as fsdp_version 2 does), and read weights within "
        "FullyShardedDataParallel.summon_full_params."
    )


def local_part(weight: Tensor) -> Tensor:
    """Return the part of a weight that this process has, perhaps an empty one."""
    return weight.to_local() if is_sharded(weight) else weight  # type: ignore[attr-defined]


def whole(weight: Tensor) -> Tensor:
    """Return a weight without its gradient; for all rows of a DTensor all processes must call."""
    weight = weight.detach()
    if not is_sharded(weight):
        return weight
    # With offloading the shards lie on the CPU, where there may be no backend to gather them.
    shards: Any = weight.to(weight.device_mesh.device_type)  # type: ignore[attr-defined]
    return shards.full_tensor()


@torch.no_grad()
def like(weight: Any, value: Tensor) -> Tensor:
    """Return a value known to all processes in the dtype and sharding of a weight."""
    value = value.to(weight.dtype)
    if not is_sharded(weight):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value,
        weight.device_mesh,
        weight.placements,
        src_data_rank=None,  # nothing is sent
    ).to(weight.device)


def refuse_tensor_parallel(name: str, weight: Tensor) -> None:
    """Raise for a DTensor outside of FSDP2: its forward works on shards of the features.

    Raises:
        ValueError: the weight is such a DTensor; the sentence names the remedy.
    """
    if is_sharded(weight):
        raise ValueError(
            f"{name} is split by tensor parallelism ({weight.placements}), with which a subspace "  # type: ignore[attr-defined]
            "cannot be projected; use FSDP2, DDP or no subspace."
        )


def by_fsdp2(model: nn.Module) -> bool:
    """Say whether `fully_shard` was applied to the model or to parts of it."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(m, module.FSDPModule) for m in model.modules())


def gathered(model: nn.Module) -> AbstractContextManager[Any]:
    """Gather weights cut into slices by FSDP inside the context; all processes must enter."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not any(
        isinstance(unit, module.FullyShardedDataParallel) for unit in model.modules()
    ):
        return nullcontext()
    return module.FullyShardedDataParallel.summon_full_params(model, writeback=False)


def split_loading(config: Any) -> dict[str, Any]:
    """Return the options with which `from_pretrained` reads a part of every weight (FSDP2).

    Each decoder block is gathered by itself; transformers knows their names in most architectures.

    Raises:
        ValueError: a quantised model, or a transformers that cannot.
    """
    import transformers

    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The weights of the model are quantised, and a run splits whole ones alone: give the "
            "checkpoint in 16 or 32 bits, or launch the run with --multi_gpu."
        )
    if not hasattr(transformers.PreTrainedModel, "is_distributed_loading_by_transformers"):
        raise ValueError(
            f"transformers {transformers.__version__} cannot load a model in parts: update it, or "
            "launch the run with --multi_gpu."
        )
    from transformers.distributed import DistributedConfig

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    plan = {
        re.sub(r"\.\d+(?=\.|$)", ".*", name): "free_full_weight"
        for name, module in model.named_modules()
        if type(module).__name__ in (model._no_split_modules or ())
    }
    if not plan:
        raise ValueError(
            f"transformers does not say which modules of {type(model).__name__} are its decoder "
            "blocks, so they cannot be gathered one by one: launch the run with --multi_gpu."
        )
    gc.collect()  # the modules of the last model refer to each other
    return {"distributed_config": DistributedConfig(fsdp_size=processes.count(), fsdp_plan=plan)}


def leave_to_ddp(model: Any) -> None:
    """Let Trainer train the adapter of a split base as that of a whole one: with DDP.

    Each process has the whole adapter. By itself Trainer refuses to save its optimizer, and peft
    gathers the base in each process that saves the adapter.
    """
    base = model.get_base_model()
    base._is_distributed_loading_by_transformers, base._tp_size = False, None
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, weight in model.named_parameters() if is_sharded(weight)]
    )
