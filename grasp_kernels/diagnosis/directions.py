"""Directions of the residual stream that an adapter may have learned unasked.

Two sources, none with labels. The *weights* are those of `identification`: what the updates of many
layers have in common. The *movement* is the mean of what the adapter adds to the stream where
neutral prompts await their answer: prompts that have nothing to do with the training data should
not move together. That narrow fine-tuning leaves such traces is known (Minder et al. 2025,
arXiv 2510.13900).

Shapes: `L` blocks, `M` prompts, `D` residual width, `k` directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_kernels.diagnosis.movement import Moved
from grasp_kernels.subspace import Subspace


@dataclass(frozen=True)
class Direction:
    """Unit vectors `[L, D]`, one for each block, float32; positive is where the adapter moves."""

    name: str
    vectors: Tensor


def weight_directions(subspace: Subspace, neutral: Moved) -> list[Direction]:
    """The columns of a shared write basis, each turned to where neutral prompts move along it."""
    if subspace.stream is None:
        return []
    found = []
    for index, column in enumerate(subspace.stream.mT, start=1):
        vectors = column.expand(len(neutral.delta), -1)
        moved = neutral.along(vectors) / neutral.base.mean(dim=1, keepdim=True).clamp_min(1e-12)
        found.append(Direction(f"weights {index}", vectors if moved.mean() >= 0 else -vectors))
    return found


def movement_direction(neutral: Moved) -> list[Direction]:
    """The mean movement of neutral prompts in each block; none where a block does not move."""
    mean = neutral.delta.mean(dim=1)
    lengths = mean.norm(dim=1, keepdim=True)
    if bool((lengths == 0).all()):
        return []
    # a block before the first adapted one moves nothing: it borrows the direction of the next
    vectors = mean / lengths.clamp_min(torch.finfo(mean.dtype).tiny)
    for layer in reversed(range(len(vectors) - 1)):
        if lengths[layer] == 0:
            vectors[layer] = vectors[layer + 1]
    return [Direction("movement", vectors)]


def cosines(first: Direction, second: Direction) -> list[float]:
    """Cosine of two directions in every block."""
    return (first.vectors * second.vectors).sum(dim=1).tolist()
