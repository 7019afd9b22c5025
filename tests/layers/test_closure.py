"""Leakage of adapters and their projection after the fact."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import grasp_kernels as gk
from grasp_kernels.models.names import base_name
from grasp_kernels.ops.projection import project_columns, project_rows
from tests.helpers.comparisons import logits
from tests.helpers.models import a_subspace, bases_of, tiny_model, tiny_peft_model


def test_leakage_is_the_share_of_the_update() -> None:
    model = tiny_peft_model()
    subspace = a_subspace(model)
    leaks = gk.leakage(model, subspace)
    assert leaks.keys() == bases_of(model, subspace).keys() and not leaks.unseen
    for name, module in model.named_modules():
        site = base_name(name)
        if site in leaks and hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").double()
            expected = (subspace.basis.double().mT @ delta).norm() / delta.norm()
            assert leaks[site] == pytest.approx(float(expected), rel=1e-5)


def test_an_untrained_layer_leaks_nothing() -> None:
    model = tiny_peft_model()
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.down_proj.lora_B.default.weight.zero_()
    leaks = gk.leakage(model, a_subspace(model))
    assert leaks["model.layers.0.mlp.down_proj"] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projected_adapter_is_closed_and_loads_in_stock_peft(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tiny_peft_model(lora_bias=True).to(dtype)
    subspace = a_subspace(model)
    model.save_pretrained(tmp_path / "adapter")
    gk.project_adapter(tmp_path / "adapter", subspace, tmp_path / "out" / "projected")
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    assert max(gk.leakage(tmp_path / "out" / "projected", subspace).values()) <= limit
    old = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    new = load_file(tmp_path / "out" / "projected" / "adapter_model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in old.items()} == {
        k: (v.shape, v.dtype) for k, v in new.items()
    }
    changed = {key.split(".lora_")[0] for key, value in old.items() if not value.equal(new[key])}
    assert changed == {f"base_model.model.{name}" for name in bases_of(model, subspace)}
    assert all(value.equal(new[key]) for key, value in old.items() if ".lora_A." in key)
    # The layers compute with the same closed factors.
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    projected = PeftModel.from_pretrained(tiny_model().to(dtype), tmp_path / "out" / "projected")
    projected.to(dtype)
    expected = logits(model)
    assert (logits(projected) - expected).norm() <= 16 * torch.finfo(dtype).eps * expected.norm()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["projected"]


def test_bad_input_is_named(tmp_path: Path) -> None:
    model = tiny_peft_model()
    subspace = a_subspace(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="has no basis of its own; pass the subspace"):
        gk.leakage(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="no LoRA layer that writes to the residual stream has a basis"
    ):
        gk.leakage(model)
    with pytest.raises(FileExistsError, match="exists: choose another path"):
        gk.project_adapter(tmp_path / "adapter", subspace, tmp_path / "adapter")
    narrow = gk.Subspace(torch.eye(8)[:, :1])
    with pytest.raises(ValueError, match=r"has 8 rows but the layer has 32 features"):
        gk.leakage(tmp_path / "adapter", narrow)
    with pytest.raises(ValueError, match=r"has 8 rows but the layer has 32 features"):
        gk.project_adapter(tmp_path / "adapter", narrow, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        gk.project_adapter(tmp_path / "missing", subspace, tmp_path / "out")


def test_a_projection_is_as_exact_under_autocast() -> None:
    M, V = torch.randn(48, 4), torch.linalg.qr(torch.randn(48, 2))[0]
    expected = project_columns(M, V), project_rows(M.mT, V), project_columns(M[:, 0], V)
    with torch.autocast("cpu", torch.bfloat16):
        found = project_columns(M, V), project_rows(M.mT, V), project_columns(M[:, 0], V)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
    assert project_columns(M.to("meta"), V.to("meta")).shape == M.shape


def test_small_steps_outlive_a_fallback_under_autocast() -> None:
    """peft's own forward closes the parameters in place, whatever dtype autocast computes in."""
    model = tiny_peft_model()
    subspace = a_subspace(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    layer.lora_B["default"].register_forward_hook(lambda *given: None)
    parameter = layer.lora_B["default"].weight
    with torch.no_grad():
        parameter.mul_(1 + 1e-4)  # less than bfloat16 can tell
        parameter.copy_(project_columns(parameter, layer.write_basis))
    stepped = parameter.detach().clone()
    with pytest.warns(UserWarning, match="hooks"), torch.autocast("cpu", torch.bfloat16):
        logits(model)
    left = (parameter - stepped).norm() / stepped.norm()
    assert left <= 8 * torch.finfo(torch.float32).eps
    assert gk.leakage(model)[base_name("model.layers.0.self_attn.o_proj")] < 1e-6
