"""Models that accelerate has spread over devices: hooks around every call, which move inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model

import grasp_kernels as gk
from tests.helpers.comparisons import loss_and_gradients
from tests.helpers.models import a_subspace, randomise_adapter, tiny_model, tiny_peft_model

DEVICES = ["cuda:0", "cpu"] if torch.cuda.is_available() else ["cpu"]


def spread_model(device: str) -> PeftModel:
    """As of `from_pretrained(device_map=...)` on several GPUs: with hooks from the blocks down."""
    base = tiny_model()
    places = ("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "lm_head")
    dispatch_model(base, dict.fromkeys(places, device), main_device=device, force_hooks=True)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    randomise_adapter(model)
    return model


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_in_its_place_already_is_accelerated(device: str) -> None:
    spread, plain = spread_model(device), tiny_peft_model(("q_proj", "down_proj"), r=4).to(device)
    plain.load_state_dict(spread.state_dict())
    assert any("_hf_hook" in module.__dict__ for module in spread.modules())
    for model in (spread, plain):
        report = gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
        assert len(report.replaced) == 6 and not report.fallbacks
    (loss, gradients), (expected, others) = map(loss_and_gradients, (spread, plain))
    assert torch.equal(loss, expected)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


def test_an_input_that_is_elsewhere_goes_where_it_is_moved() -> None:
    layer = replaced_layer(spread_model("cpu"))
    assert layer.why_stock(torch.zeros(1, 48)) is None
    elsewhere = torch.zeros(1, 48, device="meta")
    assert layer.why_stock(elsewhere) == "input on meta for a weight on cpu"


@pytest.mark.parametrize("options", [{"offload": True}, {"io_same_device": True}])
def test_hooks_that_do_more_stay_in_charge(options: dict[str, Any]) -> None:
    layer = replaced_layer(tiny_peft_model())
    add_hook_to_module(layer.base_layer, AlignDevicesHook("cpu", weights_map={}, **options))
    assert layer.why_stock(torch.zeros(1, 48)) == "a child module has hooks"


@pytest.mark.parametrize("name", ["mlp", "mlp.down_proj"])
def test_a_hook_that_came_later_calls_the_forward_of_stock(name: str) -> None:
    model = tiny_peft_model()
    stock = loss_and_gradients(model)
    gk.apply_grasp(model)
    module = model.get_submodule(f"base_model.model.model.layers.0.{name}")
    add_hook_to_module(module, AlignDevicesHook("cpu"))
    torch.testing.assert_close(loss_and_gradients(model), stock)
    gk.remove_grasp(model)
    torch.testing.assert_close(loss_and_gradients(model), stock)


def replaced_layer(model: PeftModel) -> gk.GraspLoRALinear:
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert isinstance(layer, gk.GraspLoRALinear)
    return layer
