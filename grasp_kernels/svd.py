"""Randomized singular value decomposition of matrices and of operators that are never formed.

Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53(2), 2011: the range
finder is their Algorithm 4.4 (subspace iteration, which needs the QR factorisation between every
two products), the decomposition their Algorithm 5.1.

Shapes: leading dimensions `...` are a batch of equal shapes, `M` rows, `N` columns, `L` columns of
a sketch.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """A matrix `[..., M, N]` known by its products alone."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def matmat(self, q: Tensor) -> Tensor:
        """`[..., N, L]` -> `[..., M, L]`"""
        ...

    def rmatmat(self, q: Tensor) -> Tensor:
        """The adjoint: `[..., M, L]` -> `[..., N, L]`"""
        ...


class MatrixOperator:
    """A dense matrix `[..., M, N]`; bf16 and fp16 are computed in float32."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim < 2 or not matrix.dtype.is_floating_point:
            raise ValueError(
                "A singular value decomposition needs a real floating matrix [..., M, N], but got "
                f"shape {tuple(matrix.shape)} of {matrix.dtype}; convert it first."
            )
        wide = matrix.dtype in (torch.float32, torch.float64)
        self._matrix = matrix if wide else matrix.float()
        self.shape, self.dtype, self.device = matrix.shape, self._matrix.dtype, matrix.device

    def matmat(self, q: Tensor) -> Tensor:
        return self._matrix @ q

    def rmatmat(self, q: Tensor) -> Tensor:
        return self._matrix.mT @ q


def randomized_range_finder(
    operator: Operator, size: int, *, n_iter: int, generator: torch.Generator
) -> Tensor:
    """Orthonormal `Q[..., M, size]` close to the span of the leading left singular vectors.

    Algorithm 4.4: without the QR between the products, every direction whose singular value is
    below `eps^(1/(2 n_iter + 1))` of the largest would be lost to rounding.

    Args:
        size: columns of the sketch, at most `min(M, N)`.
        n_iter: power iterations, two products each.
        generator: source of the Gaussian test matrix, which is drawn in float32 and on the device
            of the generator, so the same generator gives the same sketch on any device and in any
            dtype, up to rounding.
    """
    shape = (*operator.shape[:-2], operator.shape[-1], size)
    test = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    q = _orthonormalised(operator.matmat(test.to(operator.device, operator.dtype)))
    for _ in range(n_iter):
        q = _orthonormalised(operator.rmatmat(q))
        q = _orthonormalised(operator.matmat(q))
    return q


def randomized_svd(
    matrix: Tensor | Operator,
    rank: int,
    *,
    n_oversamples: int = 8,
    n_iter: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` triples of `torch.linalg.svd(matrix, full_matrices=False)`.

    Exact to rounding if the matrix has at most `rank + n_oversamples` non-zero singular values,
    which is the case for a LoRA delta whose rank is not above that. Otherwise the relative error of
    the j-th singular value falls as `(σ_{rank + n_oversamples + 1} / σ_j)^(4 n_iter + 2)` (Theorem
    10.9 and its corollaries).

    Args:
        matrix: `[..., M, N]`, or an operator with `shape, dtype, device, matmat, rmatmat`.
            float32 and float64 are kept; bf16 and fp16 are computed, and returned, in float32.
        rank: number of triples, 1 to min(M, N).
        generator: source of randomness; None means a new one with seed 0, so that results can be
            reproduced and torch's global generator is left alone.

    Returns:
        `U[..., M, rank]`, `S[..., rank]` (descending), `Vh[..., rank, N]`.

    Raises:
        ValueError: rank, n_oversamples or n_iter out of range, or not a real floating matrix.
    """
    operator = MatrixOperator(matrix) if isinstance(matrix, Tensor) else matrix
    *_, m, n = operator.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(
            f"rank is {rank}, but a {m} × {n} matrix has between 1 and {min(m, n)} singular values "
            "to give; choose one of those."
        )
    if n_oversamples < 0 or n_iter < 0:
        raise ValueError(
            f"n_oversamples is {n_oversamples} and n_iter is {n_iter}; both must be at least 0."
        )
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    size = min(rank + n_oversamples, m, n)
    q = randomized_range_finder(operator, size, n_iter=n_iter, generator=generator)
    # svd of the small matrix (Qᵀ A)ᵀ = V S Ũᵀ; torch's svd is most accurate for tall inputs
    v, s, ut = torch.linalg.svd(operator.rmatmat(q), full_matrices=False)
    return q @ ut.mT[..., :rank], s[..., :rank], v[..., :rank].mT


def _orthonormalised(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns)[0]
