"""Randomized singular value decomposition of matrices and of operators that are never formed.

Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53(2), 2011: the range
finder is their Algorithm 4.4 (subspace iteration, which needs the QR factorisation between every
two products), the decomposition their Algorithm 5.1.

Shapes: leading dimensions `...` are a batch of equal shapes, `M` rows, `N` columns, `R` inner width
of a factored matrix, `L` columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self._matrix = _working(matrix)
        self.shape, self.dtype, self.device = matrix.shape, self._matrix.dtype, matrix.device

    def matmat(self, q: Tensor) -> Tensor:
        return self._matrix @ q

    def rmatmat(self, q: Tensor) -> Tensor:
        return self._matrix.mT @ q


class FactoredOperator:
    """`scaling · B A` from `B[..., M, R]` and `A[..., R, N]`, never multiplied out."""

    def __init__(self, B: Tensor, A: Tensor, scaling: float = 1.0) -> None:
        if B.shape[:-2] != A.shape[:-2] or B.shape[-1] != A.shape[-2]:
            raise ValueError(
                f"B has shape {tuple(B.shape)} and A {tuple(A.shape)}; they must be [..., M, R] "
                "and [..., R, N] with the same R."
            )
        if B.dtype != A.dtype or B.device != A.device:
            raise ValueError(
                f"B is {B.dtype} on {B.device} and A {A.dtype} on {A.device}; give both in one "
                "dtype on one device."
            )
        self._b, self._a, self._scaling = _working(B), _working(A), scaling
        self.shape = torch.Size((*B.shape[:-1], A.shape[-1]))
        self.dtype, self.device = self._b.dtype, B.device

    def matmat(self, q: Tensor) -> Tensor:
        return self._b @ (self._a @ q) * self._scaling

    def rmatmat(self, q: Tensor) -> Tensor:
        return self._a.mT @ (self._b.mT @ q) * self._scaling


class StackedOperator:
    """Operators of equal height side by side: `[..., M, N₁ + N₂ + …]`."""

    def __init__(self, blocks: Sequence[Operator]) -> None:
        if not blocks:
            raise ValueError("StackedOperator got no blocks; give at least one.")
        first = blocks[0]
        for block in blocks:
            if block.shape[:-1] != first.shape[:-1] or block.dtype != first.dtype:
                raise ValueError(
                    f"A block of shape {tuple(block.shape)} in {block.dtype} cannot stand beside "
                    f"one of shape {tuple(first.shape)} in {first.dtype}; give blocks of equal "
                    "height and dtype."
                )
        self._blocks = tuple(blocks)
        self._widths = [block.shape[-1] for block in blocks]
        self.shape = torch.Size((*first.shape[:-1], sum(self._widths)))
        self.dtype, self.device = first.dtype, first.device

    def matmat(self, q: Tensor) -> Tensor:
        parts = q.split(self._widths, dim=-2)
        total = self._blocks[0].matmat(parts[0])
        for block, part in zip(self._blocks[1:], parts[1:], strict=True):
            total = total + block.matmat(part)
        return total

    def rmatmat(self, q: Tensor) -> Tensor:
        return torch.cat([block.rmatmat(q) for block in self._blocks], dim=-2)


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


def _working(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()


def _orthonormalised(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns)[0]
