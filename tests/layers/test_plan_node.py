"""The node of autograd of a planned call, and the life of a plan."""

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from grasp_kernels import cpu
from tests.helpers.oracle import budget, relative_error
from tests.helpers.plans import K, N, T, everything, planned

pytest_plugins = ("tests.helpers.plans",)
pytestmark = pytest.mark.usefixtures("kind")

# --- a node of autograd like torch's own


def test_a_second_derivative_is_refused() -> None:
    layer, _, x = planned()
    y = layer(x.requires_grad_())
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()


def test_a_graph_is_kept_only_if_asked_for() -> None:
    layer, _, x = planned()
    y = layer(x.requires_grad_()).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.parametrize("which", ["x", "base", "A", "basis"])
def test_a_change_in_place_between_forward_and_backward_is_an_error(which: str) -> None:
    layer, _, x = planned(Q=2, closed=False)
    x = x.clone().requires_grad_()
    z = x * 1.0
    y = layer(z)
    changed = {
        "x": z,
        "base": layer.base_layer.weight,
        "A": layer.lora_A["default"].weight,
        "basis": layer.write_basis,
    }[which]
    with torch.no_grad():
        changed.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_by_the_factors_is_refused_too() -> None:
    """A penalty on gradients, which asks for named gradients only."""
    layer, _, x = planned()
    x.requires_grad_()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    gradients = torch.autograd.grad(layer(x).square().sum(), [x, A, B], create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    for asked in (x, A, B):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(penalty, asked, retain_graph=True)
    A.requires_grad_(False)  # X is not kept then, and the first derivative is refused
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_a_second_derivative_through_autocast_is_refused() -> None:
    if not cpu.multiplies(torch.bfloat16):
        pytest.skip("this CPU takes bfloat16 through float32")
    layer, _, x = planned()
    x.requires_grad_()
    A = layer.lora_A["default"].weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        found = torch.autograd.grad(y.sum(), [x, A], create_graph=True)
        torch.autograd.grad(sum(gradient.square().sum() for gradient in found), x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_draws_the_mask_again(reentrant: bool) -> None:
    layer, _, x = planned(lora_dropout=0.5)

    def twice(x: Tensor) -> Tensor:
        return layer(torch.tanh(layer(x)[..., :K]))

    def run(saving: bool) -> list[Tensor]:
        torch.manual_seed(5)
        given = x.detach().clone().requires_grad_()
        y = checkpoint(twice, given, use_reentrant=reentrant) if saving else twice(given)
        layer.zero_grad()
        y.sum().backward()
        return [
            given.grad,
            layer.lora_A["default"].weight.grad,
            layer.lora_B["default"].weight.grad,
        ]

    for plain, saved in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, saved)


def test_saved_tensors_pass_their_hooks() -> None:
    layer, _, x = planned()
    expected = everything(layer, x)
    with save_on_cpu():
        found = everything(layer, x)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_compiled_backward_replays_the_node(dropout: float) -> None:
    layer, _, x = planned(lora_dropout=dropout, lora_bias=True)
    expected = everything(layer, x)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        torch.manual_seed(7)
        given = x.detach().clone().requires_grad_()
        y = layer(given)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    trained = [p.grad for p in layer.parameters() if p.requires_grad]
    for found, one in zip([y.detach(), given.grad, *trained], expected, strict=True):
        assert relative_error(found, one) <= 2 * budget(0.0, torch.float32, 2 * T)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_is_made_where_none_is_wanted(mode: Any) -> None:
    layer, kept, x = planned()
    expected = layer(x).detach()
    with mode():
        found = layer(x)
    assert layer._plan is kept
    assert not found.requires_grad and torch.equal(found, expected)


def test_other_threads_run_beside_a_call() -> None:
    layer, _, x = planned()
    expected, found = everything(layer, x), []
    threads = [
        threading.Thread(target=lambda: found.append(everything(layer, x))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(map(torch.equal, one, expected)) for one in found) and len(found) == 4


# --- a plan belongs to one layer, and dies with it


def test_a_copy_has_no_plan_and_computes_the_same() -> None:
    layer, _, x = planned()
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.__dict__["_plan"] is None
        assert torch.equal(other(x), expected)
        other.lora_B["default"].weight.data.zero_()
        assert not torch.equal(other(x), expected)
    assert torch.equal(layer(x), expected)


def test_a_shallow_copy_may_share_a_plan() -> None:
    layer, _, x = planned()
    other = copy.copy(layer)
    expected = layer(x)
    del layer
    gc.collect()
    assert torch.equal(other(x), expected)


def test_a_layer_is_freed_at_once() -> None:
    layer, kept, _ = planned()
    weight = weakref.ref(layer.base_layer.weight)
    gc.disable()
    try:
        del layer, kept
        assert weight() is None
    finally:
        gc.enable()


def test_cycles_through_parameters_are_collected() -> None:
    layer, kept, _ = planned()
    weight = layer.base_layer.weight
    weight.owner = layer
    layer.lora_A["default"].weight.register_hook(lambda gradient, owner=layer: None)
    freed = weakref.ref(weight)
    del layer, kept, weight
    gc.collect()
    assert freed() is None


def test_a_parameter_can_be_swapped() -> None:
    layer, kept, x = planned(Q=0)
    weight = layer.base_layer.weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.zeros(N, K), requires_grad=False))
    assert layer._plan is kept
    layer.lora_B["default"].weight.data.zero_()
    assert not layer(x).any()


def test_an_output_can_be_changed_in_place(kind: str) -> None:
    if kind == "python":
        pytest.skip("an output in three dimensions is a view there")
    layer, _, x = planned()
    y = layer(x.requires_grad_())
    y += 1
    y.sum().backward()
    assert x.grad is not None


def test_a_released_layer_has_no_plan() -> None:
    layer, _, x = planned()
    expected = layer(x)
    layer.release()
    assert "_plan" not in layer.__dict__
    assert relative_error(layer(x), expected) <= 2 * budget(0.0, torch.float32, K)
