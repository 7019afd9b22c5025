"""DDP, FSDP and FSDP2 on two processes against one; what is refused; adapters in several files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import grasp_kernels as gk
from grasp_kernels.adapters import load_adapter
from grasp_kernels.adapters.files import INDEX, WEIGHTS
from grasp_kernels.models.names import base_name
from tests.helpers.models import bases_of, tiny_model, tiny_peft_model
from tests.helpers.oracle import relative_error
from tests.helpers.two_processes import (
    SCENARIOS,
    batches,
    frozen_A_and_regularizer,
    model_and_subspace,
    start,
    train,
)

pytest_plugins = ("tests.helpers.runs",)
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left their results."""
    folder = tmp_path_factory.mktemp("processes")
    start(list(SCENARIOS), folder)
    return folder


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and saved weights of one process with the same batches."""
    model, subspace = model_and_subspace()
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    return train(model, batches()), model.state_dict()


AS_RUN = sorted(name for name in SCENARIOS if name.endswith("_as_run"))
EXACT = sorted(set(SCENARIOS) - {"fsdp2_leaves", "split_loading", *AS_RUN})


def result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_learn_what_one_does(spread: Path, alone: Any, name: str) -> None:
    found = result(spread, name)
    expected = alone[0][: len(found["losses"])]
    assert found["losses"] == pytest.approx(expected, rel=1e-5)
    assert found["leakage"] <= 1e-6
    assert found["stock"] == []
    assert found.get("fallbacks", {}) == {}
    assert found.get("parameters", ["DTensor"]) == ["DTensor"]


@pytest.mark.parametrize("name", [n for n in EXACT if n != "ddp_two_forwards"])
def test_what_is_saved_is_closed_and_stock_peft_computes_it(
    spread: Path, alone: Any, logits_in_parts: list[Tensor], name: str
) -> None:
    stock = PeftModel.from_pretrained(tiny_model(), str(spread / name)).eval()
    _, subspace = model_and_subspace()
    assert max(gk.leakage(spread / name, subspace).values()) <= 1e-6
    if len(result(spread, name)["losses"]) == len(alone[0]):
        whole, *in_parts = logits_in_parts
        rounding = max(relative_error(found, whole) for found in in_parts)
        assert relative_error(first_logits(stock), whole) <= 2 * rounding


def first_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batches()[0]).logits


@pytest.fixture(scope="module")
def logits_in_parts() -> list[Tensor]:
    """Of one process that sums each batch whole, in two and in four parts: the same training but
    for its rounding, which AdamW makes much of."""
    found = []
    for parts in (1, 2, 4):
        model, subspace = model_and_subspace()
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
        train(model, batches(), parts=parts)
        found.append(first_logits(model))
    return found


@pytest.mark.parametrize("name", AS_RUN)
def test_two_processes_retrain_as_run_does(spread: Path, name: str) -> None:
    """With A frozen, and a divergence whose documents are a second forward of each step."""
    model, subspace, regularizer = frozen_A_and_regularizer()
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    expected = train(model, batches(), penalty=regularizer.loss)
    found = result(spread, name)
    assert found["losses"] == pytest.approx(expected, rel=1e-5)
    assert found["leakage"] <= 1e-6
    assert found["stock"] == []  # no pass of the base model
    assert found["free"] == []
    saved = load_file(spread / name / WEIGHTS)
    for key, value in model.state_dict().items():
        if ".lora_A." in key:
            assert torch.equal(saved[key.replace(".default", "")], value), key


@pytest.mark.skipif("split_loading" not in SCENARIOS, reason="this transformers loads whole models")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_loaded_in_parts_is_the_whole_one(spread: Path, kind: str) -> None:
    found = result(spread, "split_loading")["found"][kind]
    assert found["error"] <= 1e-6
    assert found["same answers"]  # of other lengths in each process
    assert found["part"] < 0.6
    assert found["blocks"] == 3  # gathered one by one


def test_layers_that_are_units_of_their_own_stay_with_peft(spread: Path) -> None:
    found = result(spread, "fsdp2_leaves")
    assert found["stock"] == ["a child module has hooks"]
    assert found["leakage"] <= 1e-6
    assert found["losses"][-1] < 6.0


@pytest.mark.parametrize("name", ["fsdp2_afterwards", "fsdp1"])
def test_identification_reads_a_sharded_model(spread: Path, name: str) -> None:
    found = gk.Subspace.load(spread / name / "subspace.safetensors")
    model, _ = model_and_subspace()
    expected = gk.identify(spread / name, base_model=model, k=1)
    overlap = torch.linalg.svdvals(found.basis.mT @ expected.basis).min()
    assert overlap == pytest.approx(1.0, abs=1e-4)


def test_slices_are_refused_outside_of_their_unit(spread: Path) -> None:
    for message in result(spread, "fsdp1")["refused"].values():
        assert "outside of the unit that FSDP wraps; replace LoRA layers before" in message


# --- what is refused before a training starts


def partition(model: nn.Module) -> None:
    """Leave the weights as ZeRO-3 of DeepSpeed does between the calls of their modules."""
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
        parameter.ds_id = 0


def test_zero_3_is_refused_at_the_replacement_and_at_the_first_forward() -> None:
    model, subspace = model_and_subspace()
    partition(model)
    with pytest.raises(ValueError, match=r"o_proj' is partitioned by ZeRO-3 .* use ZeRO-2 or FSDP"):
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    assert set(gk.apply_grasp(model).fallbacks.values()) == {
        "only a slice of a weight is on this process"
    }

    model, subspace = model_and_subspace()
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    partition(layer)
    with pytest.raises(ValueError, match="lora_B of the adapter 'default' is partitioned by ZeRO"):
        layer(torch.randn(2, 32))
    with pytest.raises(ValueError, match="is partitioned by ZeRO-3"):
        gk.leakage(model)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_tensor_parallelism_is_refused_with_a_subspace(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, subspace = model_and_subspace()
    attention = model.get_base_model().model.layers[0].self_attn
    mesh = init_device_mesh("cpu", (1,))
    parallelize_module(attention, mesh, {"o_proj.base_layer": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"o_proj' is split by tensor parallelism .*use FSDP2"):
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    assert list(gk.apply_grasp(model).fallbacks) == ["model.layers.0.self_attn.o_proj"]


def test_mixed_precision_of_fsdp_does_not_round_the_bases(one_process: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    model, subspace = model_and_subspace()
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    rounded = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, mixed_precision=rounded, device_id=torch.device("cpu")
    )
    ids = batches()[0]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert {buffer.dtype for buffer in model.buffers()} == {torch.bfloat16}
    for name, V in bases_of(model, subspace).items():
        layer = model.get_base_model().get_submodule(name)
        assert torch.equal(layer.write_basis, V)


def test_names_are_those_of_the_base_model_in_every_wrapper() -> None:
    inner = "base_model.model.model.layers.0.mlp.down_proj"
    for name in (
        inner,
        f"module.{inner}",
        f"_orig_mod.module.{inner}.base_layer",
        f"_fsdp_wrapped_module.{inner.replace('0.mlp', '0._checkpoint_wrapped_module.mlp')}",
        f"{inner}._fsdp_wrapped_module",
    ):
        assert base_name(name) == "model.layers.0.mlp.down_proj"


# --- adapters in several files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """An adapter folder whose weights are two files with an index."""
    tiny_peft_model().save_pretrained(tmp_path / "whole")
    folder = tmp_path / "shards"
    shutil.copytree(tmp_path / "whole", folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: files[i % 2] for i, key in enumerate(sorted(tensors))}  # A here, its B there
    for file in files:
        save_file({k: tensors[k] for k, f in where.items() if f == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_shards_are_one_adapter(shards: Path, tmp_path: Path) -> None:
    subspace = gk.identify(tmp_path / "whole", k=1)
    for source in (shards, shards / INDEX):
        found = gk.identify(source, k=1)
        torch.testing.assert_close(found.basis, subspace.basis)
    gk.project_adapter(shards, subspace, tmp_path / "projected")
    assert not (tmp_path / "projected" / INDEX).exists()
    assert max(gk.leakage(tmp_path / "projected", subspace).values()) <= 1e-6


def test_missing_shards_and_broken_indices_are_named(shards: Path) -> None:
    (shards / "adapter_model-00002-of-00002.safetensors").unlink()
    said = r"not next to it \(adapter_model-00002-of-00002\.safetensors\)"
    with pytest.raises(FileNotFoundError, match=said):
        load_adapter(shards)
    (shards / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="is not a valid index of shards"):
        load_adapter(shards)


def test_a_distributed_checkpoint_is_read_once_it_is_merged(spread: Path, tmp_path: Path) -> None:
    from accelerate.utils import merge_fsdp_weights

    saved = spread / "fsdp2_afterwards"
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(saved / "pytorch_model_fsdp_0", checkpoint / "pytorch_model_fsdp_0")
    for source in (checkpoint, checkpoint / "pytorch_model_fsdp_0"):
        with pytest.raises(ValueError, match=r"index is a pickle.*run `accelerate merge-weights"):
            load_adapter(source)
    merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(tmp_path / "merged"))
    shutil.copy(saved / "adapter_config.json", tmp_path / "merged")
    merged = gk.identify(tmp_path / "merged" / "model.safetensors", k=1)
    torch.testing.assert_close(merged.basis, gk.identify(saved, k=1).basis)


# --- the example


def test_the_example_on_two_processes(
    tiny_model_dir: Path, chat_jsonl: Path, tmp_path: Path
) -> None:
    subspace = model_and_subspace()[1]
    subspace.save(tmp_path / "subspace.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "examples" / "finetune_fsdp.py")]
    command += [str(tiny_model_dir), str(chat_jsonl), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--subspace", str(tmp_path / "subspace.safetensors")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "layers on GraspLoRALinear" in done.stdout
    assert "largest share of an update along the subspace" in done.stdout
    assert max(gk.leakage(tmp_path / "out", subspace).values()) <= 1e-6
