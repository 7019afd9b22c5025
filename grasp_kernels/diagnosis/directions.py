"""The direction of the residual stream along which neutral prompts move.

It is the mean of what the adapter adds to the stream where neutral prompts await their answer:
prompts that have nothing to do with the training data should not move together. That narrow
fine-tuning leaves such traces is known (Minder et al. 2025, arXiv 2510.13900).

Shapes: `L` blocks, `M` prompts, `D` residual width, `k` directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_kernels.diagnosis.movement import Moved


@dataclass(frozen=True)
class Direction:
    """Unit vectors `[L, D]`, one for each block, float32; positive is where the adapter moves.

    `folds` says how to test it on prompts that had no part in finding it: pairs of unit vectors
    `[L, D]` and the indices of the prompts to test them on.
    """

    name: str
    vectors: Tensor
    folds: tuple[tuple[Tensor, list[int]], ...]


def movement_direction(neutral: Moved) -> list[Direction]:
    """The mean movement of neutral prompts in each block; none where nothing moves.

    Each half of the prompts is tested with the direction of the other half.
    """
    if not bool(neutral.delta.any()):
        return []
    count = neutral.delta.shape[1]
    halves = [list(range(start, count, 2)) for start in (0, 1)]
    folds = tuple((_mean(neutral, halves[1 - i]), halves[i]) for i in (0, 1))
    return [Direction("movement", _mean(neutral, list(range(count))), folds)]


def _mean(neutral: Moved, chosen: list[int]) -> Tensor:
    """Unit vectors `[L, D]`. A block before the first adapted one moves nothing: it gets the
    direction of the next."""
    mean = neutral.delta[:, chosen].mean(dim=1)
    lengths = mean.norm(dim=1, keepdim=True)
    vectors = mean / lengths.clamp_min(torch.finfo(mean.dtype).tiny)
    for layer in reversed(range(len(vectors) - 1)):
        if lengths[layer] == 0:
            vectors[layer] = vectors[layer + 1]
    return vectors
