"""Identity forward, projected backward: for writers that a LoRA operator does not cover.

Shapes: T tokens, N residual width, Q write basis size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def project_out(matrix: Tensor, basis: Tensor) -> Tensor:
    """`M (I − V Vᵀ)` for `M[..., N]` and orthonormal `V[N, Q]`, in the dtype of `M`."""
    basis = basis.to(matrix.dtype)
    return matrix - (matrix @ basis) @ basis.mT


class _ProjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None]:
        (basis,) = ctx.saved_tensors
        return project_out(dy[0], basis.to(dy[0].device)), None


def project_gradient(y: Tensor, basis: Tensor) -> Tensor:
    """Return `y[..., N]` unchanged; its gradient becomes `dY (I − V Vᵀ)`.

    The residual form of gradient projection for a module that has no LoRA operator of its own,
    or for the output of a whole block. `basis[N, Q]` has orthonormal columns.
    """
    if basis.dim() != 2 or y.shape[-1] != basis.shape[0]:
        raise ValueError(
            f"the basis has shape {tuple(basis.shape)} but y has {y.shape[-1]} features; "
            f"pass orthonormal columns of shape [{y.shape[-1]}, Q]"
        )
    return _ProjectGradient.apply(y, basis)
