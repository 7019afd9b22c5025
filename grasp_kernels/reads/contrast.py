"""Second moments of two texts -> the rows of A along which they differ most.

The rows are the leading solutions of `S_train a = λ (S_own + ρ I) a`: what they read is strong in
training text and weak in the text that the base model makes up. Both texts seen through them are
uncorrelated, so the gradient of B is well conditioned.

Shapes: K in, R LoRA rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grasp_kernels.svd import randomized_svd

# ρ as a part of the mean eigenvalue of both moments. In a world of 128 dimensions drift fell with
# it and then stayed: 1e-2 .27, 1e-3 .19, 1e-4 .14 of a naive .95; smaller only trusts noise.
RIDGE = 1e-4
_POWER_ITERATIONS = 8


def contrasting_rows(
    training: Tensor, own: Tensor, rank: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`A[R, K]` and the ratios `[R]`, float32, the largest ratio first.

    A row reads training text with the mean square that a row of peft's initialisation has on inputs
    of its size, `E (a·x)² = E|x|² / 3K`, so that learning rates keep their meaning; or own text, if
    that has more of it.

    Args:
        training, own: `E x xᵀ [K, K]` of the two texts.
        rank: R; rows beyond K are zero, and so are all where no text came.
    """
    K = len(training)
    training, own = training.double(), own.to(torch.float64, copy=True)
    A, ratios = torch.zeros(rank, K), torch.zeros(rank)
    level = RIDGE * (training.trace() + own.trace()) / (2 * K)
    if level == 0:
        return A, ratios
    L = _cholesky(own, level)
    n = min(rank, K)
    U, found, _ = randomized_svd(
        _Whitened(training, L),
        n,
        n_iter=_POWER_ITERATIONS,
        n_oversamples=n,
        generator=generator,
    )
    rows = torch.linalg.solve_triangular(L.mT, U, upper=True).mT  # a (S_own + ρ I) a = 1
    size = (training.trace() / (3 * K) / found.clamp_min(1)).sqrt()
    A[:n], ratios[:n] = (size[:, None] * rows).cpu(), found.cpu()
    return A, ratios


def _cholesky(S: Tensor, level: float | Tensor) -> Tensor:
    """`L[K, K]` of `S + level I`, in place of S: it has 1.6 GB in the widest layer of an 8B model.

    Of little text S has no more rank than tokens, and its float32 sums are off by more than the
    level where a few coordinates have most of it: then ten times the level, and so on.
    """
    S.diagonal().add_(level)
    L, failed = torch.linalg.cholesky_ex(S)
    while failed:
        if not S.isfinite().all():
            raise ValueError("The inputs of a layer are not finite: use float32 or bfloat16.")
        S.diagonal().add_(9 * level)
        level = 10 * level
        L, failed = torch.linalg.cholesky_ex(S)
    return L


class _Whitened:
    """`L⁻¹ S L⁻ᵀ [K, K]`, symmetric, known by its products: its singular triples are the solutions.

    Args:
        S: `[K, K]`, positive semidefinite.
        L: lower triangular `[K, K]`.
    """

    def __init__(self, S: Tensor, L: Tensor) -> None:
        self.S, self.L = S, L
        self.shape, self.dtype, self.device = S.shape, S.dtype, S.device

    def matmat(self, q: Tensor) -> Tensor:
        through = torch.linalg.solve_triangular(self.L.mT, q, upper=True)
        return torch.linalg.solve_triangular(self.L, self.S @ through, upper=False)

    rmatmat = matmat
