"""The product `X = act(G) ⊙ U` of a gated MLP and its gradients, each in one pass over memory.

Library calls take five passes and nine: `act(G)` and the gradient of it go through memory.
Both activations are `act(g) = g σ(z)`: `z = g` is silu, `z = √(8/π) (g + 0.044715 g³)` is gelu with
a tanh. So `act'(g) = σ + g σ (1 − σ) z'`. Shapes: n elements.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels.ops.gpu.blocks import rounded
from grasp_kernels.ops.gpu.launch import kernel_support, launch

__all__ = ["gradients", "kernel_support", "product"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 1024  # 8 elements a thread, 16 bytes of two-byte elements
_ROOT, _CUBE = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)


@triton.jit
def _sigmoid(g, SILU: tl.constexpr):
    """Return `σ(z)` and `z'` in float32."""
    z, dz = g, g * 0.0 + 1.0
    if not SILU:
        square = g * g * _CUBE  # constants stand behind: the interpreter takes none in front
        z, dz = (square * g + g) * _ROOT, (square * 3.0 + 1.0) * _ROOT
    return tl.sigmoid(z), dz


@triton.jit(do_not_specialize=["n"])
def _product_kernel(
    gate, up, out, n, SILU: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Compute `out[n] = act(gate) ⊙ up`."""
    if ALIGNED:  # n is not specialised: this permits the compiler to vectorise
        n = n // 16 * 16
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    s, _ = _sigmoid(g, SILU)
    tl.store(out + at, rounded(g * s * u, out.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["n"])
def _gradients_kernel(
    dx, gate, up, dgate, dup, n, SILU: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Compute `dgate[n]` and `dup[n]` from `dx[n]`."""
    if ALIGNED:
        n = n // 16 * 16
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dx + at, mask=at < n, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    s, dz = _sigmoid(g, SILU)
    of_gate = d * u * (s + g * s * (1.0 - s) * dz)
    tl.store(dgate + at, rounded(of_gate, dgate.dtype.element_ty), mask=at < n)
    tl.store(dup + at, rounded(d * g * s, dup.dtype.element_ty), mask=at < n)


def product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return `X[..., K]`; see `Gate.product`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(up)
    _run(_product_kernel, activation, gate=gate, up=up, out=out)
    return out


def gradients(dx: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return `dG`, `dU` `[..., K]`; see `Gate.gradients`."""
    dx, gate, up = dx.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _run(_gradients_kernel, activation, dx=dx, gate=gate, up=up, dgate=dgate, dup=dup)
    return dgate, dup


def _run(kernel, activation: str, **tensors: Tensor) -> None:
    like = tensors["up"]
    n = like.numel()
    launch(
        kernel, (triton.cdiv(n, _BLOCK),), like, **tensors, n=n,
        SILU=activation == "silu", BLOCK=_BLOCK, ALIGNED=n % 16 == 0,
    )  # fmt: skip
