"""The part of an adapter's effect that its movement along a direction carries.

After every block, every token gets the component along `v` that it has in the other model.
*Removal* gives the adapter the component of the base model, `h ← h − v vᵀ (h − h_base)`: only the
movement along `v` is lost. *Transfer* gives the base model the component of the adapter. If a
direction carries the effect, it is needed for it (removal) and enough for it (transfer).

The same is done with random directions; without this comparison the numbers mean nothing.

Shapes: `B` sequences of a batch, `T` tokens, `M` positions, `V` vocabulary, `L` blocks, `D`
residual width, `J` candidates (the direction and random ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.diagnosis.answers import Tokens, answer_batches
from grasp_kernels.diagnosis.effect import divergence
from grasp_kernels.diagnosis.movement import Direction
from grasp_kernels.diagnosis.pair import Pair, Position
from grasp_kernels.models.frozen_model import Edit


def random_directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw unit vectors `[J, D]`, uniform on the sphere."""
    drawn = torch.randn(count, width, generator=generator, device=generator.device).cpu()
    return drawn / drawn.norm(dim=1, keepdim=True)


def measure_exchange(
    pair: Pair, answers: Sequence[Tokens], direction: Direction, random: Tensor, batch_size: int
) -> dict[str, dict[str, float]]:
    """Measure removal and transfer on answers that were not used to find the direction.

    Returns:
        removal: part of the adapter's effect that is lost: 1 if none of the effect is left, below 0
        if the direction held it back; transfer: part of the way from the base model to the
        adapter. Each has value, and random_max, the largest value of the random directions
        `[J, D]`. JSON-able.
    """
    total = torch.zeros(2, 2 + len(random), dtype=torch.float64)
    for vectors, chosen in direction.folds:
        candidates = torch.stack([vectors, *(one.expand_as(vectors) for one in random)])
        for batch in answer_batches([answers[i] for i in chosen], batch_size):
            total += exchange(pair, batch.sequences, batch.positions, candidates)
    whole, left = total[:, :1], total[:, 1:]
    parts = torch.where(whole > 0, 1 - left / whole.clamp_min(1e-300), 0.0).tolist()
    return {
        name: {"value": value, "random_max": max(others)}
        for name, (value, *others) in zip(("removal", "transfer"), parts, strict=True)
    }


def exchange(
    pair: Pair,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Position],
    vectors: Tensor,
) -> Tensor:
    """Return sums over positions of KL divergences `[2, 1 + J]`, float64, in nats.

    First row: KL(base ‖ adapter), and KL(base ‖ adapter without each unit vector of `[J, L, D]`).
    Second row: KL(adapter ‖ base), and KL(adapter ‖ base with each unit vector).
    """
    kept: dict[bool, dict[int, Tensor]] = {False: {}, True: {}}
    plain: dict[bool, Any] = {}
    for on, components in kept.items():
        edits = {i: _keeper(components, i, vectors[:, i]) for i in pair.layers}
        plain[on] = pair.log_probs(sequences, positions, adapter=on, edits=edits)

    def left(on: bool, j: int) -> float:
        edits = {i: _restorer(vectors[j, i], kept[not on][i][..., j]) for i in pair.layers}
        changed = pair.log_probs(sequences, positions, adapter=on, edits=edits)
        return divergence(plain[not on], changed)

    rows = [
        [divergence(plain[not on], plain[on]), *(left(on, j) for j in range(len(vectors)))]
        for on in (True, False)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _keeper(kept: dict[int, Tensor], layer: int, vectors: Tensor) -> Edit:
    """Return an edit that keeps only the components `[B, T, J]` of a block's output on `[J, D]`."""

    def keep(stream: Tensor) -> None:
        kept[layer] = stream.float() @ vectors.to(stream.device).mT

    return keep


def _restorer(vector: Tensor, wanted: Tensor) -> Edit:
    """Return an edit that gives the stream the wanted component `[B, T]` along `[D]`."""

    def restore(stream: Tensor) -> Tensor:
        own = vector.to(stream.device)
        missing = wanted - stream.float() @ own
        return stream + (missing[..., None] * own).to(stream.dtype)

    return restore
