"""Numbers that speak for or against a subspace, whatever its source, and where the lines are drawn.

Shapes: `D` width of the residual stream, `k`, `p`, `q` directions in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_K = 4  # k="auto" never takes more; a factor is assumed to be simple
NULL_DRAWS = 64
NULL_QUANTILE = 0.95

# In small trials with a planted factor (5 seeds, a 4-layer model) directions with a gap of at least
# 1.6 between neighbouring singular values, and an agreement of at least 0.7 between two disjoint
# halves of the data, were good ones; benign data gave gaps of 1.0 to 1.4 and agreements up to 0.2.
# They do not carry over: on a real model a factor that was in every answer had a smaller gap.
CLEAR_GAP = 1.6
CLEAR_AGREEMENT = 0.7
NO_AGREEMENT = 0.2

FROM_SMALL_MODELS = "a threshold from small models"

_LARGEST_GAP = 1e6  # stands for a division by zero, so that evidence stays finite and JSON-able


def beside(value: float, threshold: float) -> str:
    """On which side of its threshold a number is, in words that follow the number."""
    return f"{'below' if value < threshold else 'at least'} {threshold:g}"


def gap_after(singular_values: Sequence[float], k: int) -> float:
    """`σ_k / σ_{k+1}`, 1-based; the last value is followed by zero."""
    following = singular_values[k] if k < len(singular_values) else 0.0
    return min(singular_values[k - 1] / following, _LARGEST_GAP) if following else _LARGEST_GAP


def choose_k(singular_values: Sequence[float], above_null: int, most: int = MAX_K) -> int:
    """The leading values above the null up to their largest gap: 0 if none is above it.

    Args:
        singular_values: descending; one more than `most` where there are as many.
        above_null: how many of them, from the first, stand above the null.
    """
    candidates = range(1, min(above_null, most, len(singular_values)) + 1)
    return max(candidates, key=lambda k: gap_after(singular_values, k), default=0)


def overlap(first: Tensor, second: Tensor) -> float:
    """How much of the smaller of two spans, of `[D, p]` and `[D, q]`, lies in the larger one.

    The root mean square of the cosines of their principal angles, which are the singular values of
    the product of orthonormal bases (Björck and Golub 1973).
    """
    cosines = torch.linalg.svdvals(first.double().mT @ second.double()).clamp(max=1.0)
    return float(cosines.square().mean().sqrt())


def chance_overlap(k: int, width: int) -> float:
    """Expected overlap of a random direction with a `k`-dimensional subspace: `√(k / D)`."""
    return math.sqrt(k / width)
