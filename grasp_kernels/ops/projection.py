"""Projections onto the complement of a basis, of small matrices and of gradients.

Shapes: N, K widths of the residual stream or of an input, P, Q basis sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grasp_kernels.ops.autocast import without_autocast


def project_columns(matrix: Tensor, basis: Tensor | None) -> Tensor:
    """`(I − V Vᵀ) M` for `M[N, ...]` and `V[N, Q]`, at least in float32, under autocast too; `M`
    without a basis."""
    return matrix if basis is None else without_autocast(_columns, *_wide(matrix, basis))


def project_rows(matrix: Tensor, basis: Tensor | None) -> Tensor:
    """`M (I − U Uᵀ)` for `M[..., K]` and `U[K, P]`, as exact; `M` without a basis."""
    return matrix if basis is None else without_autocast(_rows, *_wide(matrix, basis))


def _columns(matrix: Tensor, basis: Tensor) -> Tensor:
    return _less(matrix, basis, basis.mT @ matrix)


def _rows(matrix: Tensor, basis: Tensor) -> Tensor:
    return _less(matrix, matrix @ basis, basis.mT)


def _wide(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return wide, basis.to(wide.dtype)


def _less(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`M − L R`, of matrices in one launch."""
    if matrix.dim() == left.dim() == right.dim() == 2:
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


def project_gradient(y: Tensor, basis: Tensor) -> Tensor:
    """Return `y[..., N]` unchanged; its gradient becomes `dY (I − V Vᵀ)`.

    The residual form of gradient projection for a module that has no LoRA operator of its own,
    or for the output of a whole block. `basis[N, Q]` has orthonormal columns.
    """
    if basis.dim() != 2 or y.shape[-1] != basis.shape[0]:
        raise ValueError(
            f"the basis has shape {tuple(basis.shape)} but y has {y.shape[-1]} features; "
            f"pass orthonormal columns of shape [{y.shape[-1]}, Q]."
        )
    return _ProjectGradient.apply(y, basis)
