"""The leading singular triples of a matrix, reproducible in every run.

Shapes: `M` rows, `N` columns.
"""

import torch
from torch import Tensor

# The relative error of the j-th value falls as (σ_{rank + 9} / σ_j)^18: Halko, Martinsson and
# Tropp, "Finding structure with randomness", SIAM Review 53(2), 2011, Theorem 10.9.
_OVERSAMPLES = 8
_ITERATIONS = 4


def leading_triples(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading `rank` triples of a real matrix `[M, N]`, by `torch.svd_lowrank`.

    bf16 and fp16 are computed, and returned, in float32. The function draws from the generators
    of torch; they are left as they were.

    Args:
        rank: number of triples, 1 to min(M, N).

    Returns:
        `U[M, rank]`, `S[rank]` (descending), `Vh[rank, N]`.
    """
    wide = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    size = min(rank + _OVERSAMPLES, *wide.shape)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(wide, q=size, niter=_ITERATIONS)
    return U[:, :rank], S[:rank], V[:, :rank].mT
