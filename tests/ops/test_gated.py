"""The product of a gated MLP against float64, by library calls and by kernels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels.layers import plan
from grasp_kernels.ops import gated
from grasp_kernels.ops.gated import ACTIVATIONS, Gate, Gated
from grasp_kernels.ops.gpu import gated as kernels
from tests.helpers.kernels import assert_exact, normal

COMPILED = plan.compiled()
BLOCK = gated._BLOCK_ELEMENTS
WAYS: dict[str, Any] = {"python": lambda gate: Gated.apply(*gate)}
if not isinstance(COMPILED, str):
    WAYS["compiled"] = COMPILED.gated
pytestmark = pytest.mark.usefixtures("poisoned")


def stock(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def parts(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    dx, gate, up = (3 * normal(*shape, dtype=dtype) for _ in range(3))
    return dx, gate.requires_grad_(), up.requires_grad_()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (2, 1, 64), (3, 41, 1100), (0, 8)])
def test_library_calls_compute_what_torch_computes(
    way: str, activation: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """To the bit in one block of rows; torch rounds the last elements of a block otherwise."""
    tolerance = 4 * torch.finfo(dtype).eps if torch.Size(shape).numel() > BLOCK else 0.0
    dx, gate, up = parts(dtype, *shape)
    found, meant = WAYS[way](Gate(gate, up, activation)), stock(gate, up, activation)
    for ours, theirs in zip(
        (found, *torch.autograd.grad(found, (gate, up), dx)),
        (meant, *torch.autograd.grad(meant, (gate, up), dx)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(len(WAYS) < 2, reason="the calls of layers are not compiled")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_ways_give_the_same_bits(activation: str) -> None:
    dx, gate, up = parts(torch.float32, 3, 41, 1100)
    found = [way(Gate(gate, up, activation)) for way in WAYS.values()]
    assert torch.equal(*found)
    of = [torch.autograd.grad(X, (gate, up), dx) for X in found]
    assert all(map(torch.equal, *of))


@pytest.mark.parametrize("way", WAYS)
def test_strided_parts_and_gradients(way: str) -> None:
    dx, gate, up = (t.detach().mT for t in parts(torch.float32, 7, 9))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    found = torch.autograd.grad(WAYS[way](Gate(gate, up, "silu")), (gate, up), dx)
    meant = torch.autograd.grad(stock(gate, up, "silu"), (gate, up), dx)
    for ours, theirs in zip(found, meant, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(way: str, activation: str) -> None:
    _, gate, up = parts(torch.float64, 2, 3)
    assert torch.autograd.gradgradcheck(
        lambda *both: WAYS[way](Gate(*both, activation)), (gate, up)
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_change_in_place_is_noticed(way: str) -> None:
    _, gate, up = parts(torch.float32, 2, 3)
    gate = gate * 1
    X = WAYS[way](Gate(gate, up, "silu"))
    gate.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        X.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 16, 64), (3, 37, 41), (0, 8)])
def test_kernels_are_exact(activation: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    dx, gate, up = parts(dtype, *shape)
    d, g, u = (t.detach().double().requires_grad_() for t in (dx, gate, up))
    X = stock(g, u, activation)
    given = gate.detach(), up.detach(), activation
    found = kernels.product(*given), *kernels.gradients(dx, *given)
    for ours, exact in zip(found, (X, *torch.autograd.grad(X, (g, u), d)), strict=True):
        if exact.numel():
            assert_exact(ours, exact.detach(), 32)


def test_kernels_take_long_products_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that says where a tensor is; nothing is computed."""

    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, elements: int, dtype: torch.dtype) -> None:
            self.elements, self.dtype, self.shape = elements, dtype, (elements,)

        def numel(self) -> int:
            return self.elements

    def takes(elements: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        tensor: Any = OnGpu(elements, dtype)
        return gated.kernels_for(Gate(tensor, tensor, "silu")) is not None

    monkeypatch.setattr(kernels, "kernel_support", lambda where: None)
    long = gated._LEAST_FOR_KERNELS
    assert takes(long)
    assert not takes(long - 1)
    assert not takes(long, torch.float64)
    monkeypatch.setattr(kernels, "kernel_support", lambda where: "it is too old")
    assert not takes(long)
    monkeypatch.setattr("grasp_kernels.ops.kernels.load", lambda name: None)  # no Triton
    assert not takes(long)
    _, gate, up = parts(torch.bfloat16, 2, 2)
    assert gated.kernels_for(Gate(gate, up, "silu")) is None  # on a CPU, however long
