"""A layer whose A is frozen, keeps no input for the backward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import grasp_kernels as gk
from tests.helpers.backends import PLACES, suited
from tests.helpers.models import tiny_model, tokens
from tests.helpers.oracle import DIFFERENTIABLE, Case, call, differentiate, make_inputs

WIDE = Case(T=65, K=136, N=120, R=16, Q=4)
CASES = [
    replace(WIDE, project=project, dropout_p=p, base=base, lora_bias=lora_bias)
    for project in ("residual", "weights")
    for p in (0.0, 0.3)
    for base, lora_bias in ((False, False), (True, True))
]


def kept_by(call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What a call returns, and the tensors that it saves for its backward."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), saved


def inputs_among(saved: list[Tensor], x: Tensor) -> int:
    return sum(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in saved)


def leaves_of(inputs: dict[str, Any], trained: tuple[str, ...]) -> dict[str, Any]:
    """Those of a call, with gradients for `trained` alone."""
    return {
        name: None if inputs[name] is None else inputs[name].clone().requires_grad_(name in trained)
        for name in DIFFERENTIABLE
    }


@pytest.mark.usefixtures("poisoned")  # what stands in for X is NaN
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_gradients_are_those_of_a_layer_whose_a_is_trained(
    backend: str, device: str, case: Case
) -> None:
    case = replace(suited(case, backend), device=device)
    inputs = make_inputs(case)
    torch.manual_seed(7)
    expected = differentiate(case, inputs, backend=backend)
    torch.manual_seed(7)
    trained = ("x", "lora_B", "lora_bias", "base")
    leaves = leaves_of(inputs, trained)
    y, saved = kept_by(lambda: call(case, inputs, leaves, backend=backend))
    assert inputs_among(saved, leaves["x"]) == 0
    named = [name for name in trained if leaves[name] is not None]
    found = torch.autograd.grad(y, [leaves[name] for name in named], inputs["dy"])
    assert torch.equal(y, expected["y"])
    for name, gradient in zip(named, found, strict=True):
        assert torch.equal(gradient, expected[f"d{name}"]), name


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("trained", ["lora_A", "weight"])
def test_what_needs_the_input_keeps_it(backend: str, device: str, trained: str) -> None:
    case = replace(suited(WIDE, backend), device=device)
    inputs = make_inputs(case)
    leaves = leaves_of(inputs, ("x", "lora_B", trained))
    _, saved = kept_by(lambda: call(case, inputs, leaves, backend=backend))
    assert inputs_among(saved, leaves["x"]) == 1


@pytest.mark.parametrize("shape", [(5, 136), (2, 3, 136), (136,), (0, 136)])
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(WIDE)
    x = torch.randn(shape, requires_grad=True)
    frozen = gk.lora_linear(x, inputs["weight"], None, inputs["lora_A"], inputs["lora_B"], 0.5)
    free = gk.lora_linear(
        x, inputs["weight"], None, inputs["lora_A"].requires_grad_(), inputs["lora_B"], 0.5
    )
    dy = torch.randn_like(free)
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (frozen, free)))


@pytest.mark.parametrize("frozen", [True, False])
def test_compiled_calls_keep_no_input_either(frozen: bool) -> None:
    inputs = make_inputs(WIDE)
    A, B = (inputs[name].requires_grad_() for name in ("lora_A", "lora_B"))
    A.requires_grad_(not frozen)

    def layer(x: Tensor) -> Tensor:
        return gk.lora_linear(x, inputs["weight"], None, A, B, 0.5)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in (65, 33, 48):  # the second length makes the graph one of any length
        x = torch.randn(T, WIDE.K, requires_grad=True)
        y, saved = kept_by(lambda x=x: compiled(x))
        assert inputs_among(saved, x) == (0 if frozen else 1)
        dy = torch.randn_like(y)
        leaves = [x, B] if frozen else [x, B, A]
        found = torch.autograd.grad(y, leaves, dy)
        expected = torch.autograd.grad(layer(x), leaves, dy)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_keeps_less_and_learns_the_same(checkpointing: bool) -> None:
    """The inputs of `down_proj`, which no other operation saves, are gone from the graph."""
    lora = LoraConfig(r=4, target_modules=["down_proj", "up_proj"])
    results = []
    for frozen in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), lora)
        gk.apply_grasp(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, parameter in model.named_parameters():
            if "lora_A" in name and frozen:
                parameter.requires_grad_(False)
        model.train()
        given: list[Tensor] = []
        handles = [
            m.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0]))
            for n, m in model.named_modules()
            if n.endswith("down_proj")
        ]
        out, saved = kept_by(lambda m=model: m(input_ids=tokens(), labels=tokens()))
        kept = sum(inputs_among(saved, x) for x in given)
        for handle in handles:
            handle.remove()
        if not checkpointing:
            assert kept == (0 if frozen else len(given)) and given
        out.loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if "lora_B" in n})
    trained, frozen_results = results
    assert all(torch.equal(trained[n], frozen_results[n]) for n in trained)
