"""The product `X = act(G) ⊙ U` of a gated MLP, which is computed again instead of kept.

    dU = dX ⊙ act(G);  dG = dX ⊙ U ⊙ act'(G)

Autograd keeps four tensors between `gate_proj`, `up_proj` and `down_proj`: `G`, `act(G)`, `U`, `X`.
Here `G` and `U` are enough. Blocks of rows on a CPU: what is between two operations stays in the
cache. Shapes: T tokens, K features of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels.ops.kernels import kernels_on

ACTIVATIONS = ("silu", "gelu_tanh")
_BLOCK_ELEMENTS = 1 << 17
# Elements from which on a GPU takes longer than Python does to launch a kernel: two passes of 2
# bytes fewer at 4 TB/s, against 44 µs. Predicted, not measured.
_LEAST_FOR_KERNELS = 1 << 25


class Gate(NamedTuple):
    """Hold `X` as a product.

    Attributes:
        gate, up: `G`, `U` `[..., K]`, of one dtype.
        activation: one of `ACTIVATIONS`.
    """

    gate: Tensor
    up: Tensor
    activation: str

    def product(self) -> Tensor:
        """Return `X[..., K]`."""
        if torch.is_grad_enabled():  # create_graph: operations that torch differentiates again
            return self._activated(self.gate) * self.up
        kernels = kernels_for(self)
        if kernels is not None:
            return kernels.product(*self)
        G, U = (flat(tensor) for tensor in self[:2])
        X = torch.empty_like(U, memory_format=torch.contiguous_format)
        for part in _parts(G):
            torch.mul(self._activated(G[part]), U[part], out=X[part])
        return X.view(self.up.shape)

    def gradients(self, dx: Tensor) -> tuple[Tensor, Tensor]:
        """Return `dG`, `dU` from `dX[..., K]`."""
        if torch.is_grad_enabled():
            dG, dU = torch.autograd.grad(self.product(), self[:2], dx, create_graph=True)
            return dG, dU
        if _is_batched(dx):
            return self._of_activation(dx * self.up, self.gate), dx * self._activated(self.gate)
        kernels = kernels_for(self)
        if kernels is not None:
            return kernels.gradients(dx, *self)
        D, G, U = map(flat, (dx, self.gate, self.up))
        dG, dU = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (G, U))
        for part in _parts(G):
            torch.mul(D[part], self._activated(G[part]), out=dU[part])
            self._of_activation(D[part] * U[part], G[part], grad_input=dG[part])
        return dG.view(self.gate.shape), dU.view(self.up.shape)

    def _activated(self, gate: Tensor) -> Tensor:
        return F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")

    def _of_activation(self, inner: Tensor, gate: Tensor, **out: Tensor) -> Tensor:
        if self.activation == "silu":
            return torch.ops.aten.silu_backward(inner, gate, **out)
        return torch.ops.aten.gelu_backward(inner, gate, approximate="tanh", **out)


class Gated(torch.autograd.Function):
    """Return `X[..., K]` with its derivative: `Gated.apply(*gate)`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return Gate(gate, up, activation).product()

    @staticmethod
    def backward(ctx: Any, *dx: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *Gate(gate, up, ctx.activation).gradients(*dx), None


def _is_batched(dx: Tensor) -> bool:
    """Say whether a gradient is many (`is_grads_batched`): those are written to no given memory."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    return bool(functorch.is_batchedtensor(dx) or functorch.is_legacy_batchedtensor(dx))


def flat(x: Tensor) -> Tensor:
    """Return `[..., K]` as `[T, K]`."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _parts(rows: Tensor) -> Iterator[slice]:
    """Yield blocks of the rows of `[T, K]`; a GPU takes all rows at once."""
    T, K = rows.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, K)) if rows.device.type == "cpu" else max(1, T)
    for start in range(0, T, step):
        yield slice(start, start + step)


def kernels_for(given: Gate) -> Any:
    """Return the module of the kernels for a long product on a GPU, or None."""
    gate, up, _ = given
    if not gate.is_cuda or gate.numel() < _LEAST_FOR_KERNELS or gate.shape != up.shape:
        return None
    module = kernels_on(gate.device, "gated")
    return module if module is not None and gate.dtype in module.DTYPES else None
