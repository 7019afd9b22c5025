"""Projections onto the complement of a basis, of small matrices and of gradients.

Shapes: N width of the residual stream, Q basis size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from grasp_kernels.ops.autocast import without_autocast


def project_columns(matrix: Tensor, basis: Tensor | None) -> Tensor:
    """Return `(I − V Vᵀ) M` for `M[N, ...]` and `V[N, Q]`; `M` without a basis.

    Products are in float32 at least, under autocast too.
    """
    return matrix if basis is None else without_autocast(_columns, matrix, basis)


def project_rows(matrix: Tensor, basis: Tensor | None) -> Tensor:
    """Return `M (I − V Vᵀ)` for `M[..., N]` and `V[N, Q]`, equally exact; `M` without a basis."""
    return matrix if basis is None else without_autocast(_rows, matrix, basis)


def _columns(matrix: Tensor, basis: Tensor) -> Tensor:
    matrix, basis = _wide(matrix, basis)
    return _less(matrix, basis, basis.mT @ matrix)


def _rows(matrix: Tensor, basis: Tensor) -> Tensor:
    matrix, basis = _wide(matrix, basis)
    return _less(matrix, matrix @ basis, basis.mT)


def _wide(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    if matrix.dtype == basis.dtype == torch.float32:
        return matrix, basis
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return wide, basis.to(wide.dtype)


def _less(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return `M − L R`, for matrices in one launch."""
    if matrix.dim() == 2:
        return torch.addmm(matrix, left, right, alpha=-1)
    return matrix - left @ right


class _ProjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None]:
        (basis,) = ctx.saved_tensors
        basis = basis.to(dy[0])
        return dy[0] - (dy[0] @ basis) @ basis.mT, None


def is_transforming() -> bool:
    """Say whether torch.func, forward-mode differentiation, an export or a trace is active.

    All of them need operations of torch.
    """
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        # torch 2.10 takes `is_exporting()` for true in all code that it compiles.
        or torch.compiler._is_exporting_flag
        or torch._C._get_tracing_state() is not None
    )


def project_gradient(y: Tensor, basis: Tensor | None) -> Tensor:
    """Return `y[..., N]` unchanged; with a basis its gradient becomes `dY (I − V Vᵀ)`.

    This is the residual form of gradient projection for a module without a LoRA operator, or for
    the output of a whole block. `basis[N, Q]` has orthonormal columns.
    """
    if basis is None:
        return y
    if basis.dim() != 2 or y.shape[-1] != basis.shape[0]:
        raise ValueError(
            f"the basis has shape {tuple(basis.shape)} but y has {y.shape[-1]} features; "
            f"pass orthonormal columns of shape [{y.shape[-1]}, Q]."
        )
    if is_transforming():  # our function cannot be transformed; both modes are projected
        basis = basis.to(y)
        along = (y @ basis) @ basis.mT
        return y - (along - along.detach())
    return _ProjectGradient.apply(y, basis)
