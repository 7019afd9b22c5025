"""What a direction does: put into the base model, and taken out of the adapter.

*Exchange* gives every token, after every block, the component along `v` that it has in the other
model. *Removal* gives the adapter that of the base model, `h ← h − v vᵀ (h − h_base)`: what was
learned along `v` goes, and nothing else. *Transfer* gives the base model that of the adapter. A
direction that carries an effect is needed for it (removal) and enough for it (transfer).

*Steering* adds `± dose · v` to the stream of the base model after one block, with the adapter's own
mean movement along `v` there as dose 1 (Turner et al. 2023, arXiv 2308.10248).

All of it is done with random directions of the same length too; without them no number means
anything.

Shapes: `B` sequences of a batch, `T` tokens, `M` positions, `V` vocabulary, `L` blocks, `D`
residual width, `J` candidates (the direction and random ones).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from torch import Tensor

from grasp_kernels.effect.answers import Batch, divergence
from grasp_kernels.effect.pair import Pair
from grasp_kernels.models.frozen_model import Edit

# Twice, since one block has to do what the adapter does in all of them.
DOSES = (-2.0, 2.0)


@dataclass(frozen=True)
class Exchange:
    """Sums of KL divergences over positions, in nats; those of several batches add up.

    `base_adapter` is KL(base ‖ adapter), `adapter_base` the reverse; `removal[J]` is KL(base ‖
    adapter without the direction), `transfer[J]` is KL(adapter ‖ base with it).
    """

    base_adapter: float
    adapter_base: float
    removal: list[float]
    transfer: list[float]

    def __add__(self, other: Exchange) -> Exchange:
        return Exchange(
            self.base_adapter + other.base_adapter,
            self.adapter_base + other.adapter_base,
            [a + b for a, b in zip(self.removal, other.removal, strict=True)],
            [a + b for a, b in zip(self.transfer, other.transfer, strict=True)],
        )

    @property
    def removed(self) -> list[float]:
        """Part of the adapter's effect that goes with each direction: 1 where nothing is left of
        it, 0 where the direction makes no difference, below 0 where it held the effect back."""
        return [_part_gone(left, self.base_adapter) for left in self.removal]

    @property
    def transferred(self) -> list[float]:
        """Part of the way from the base model to the adapter that each direction goes."""
        return [_part_gone(left, self.adapter_base) for left in self.transfer]


def exchange(pair: Pair, batch: Batch, vectors: Tensor) -> Exchange:
    """Removal and transfer along unit vectors `[J, L, D]`, one direction at a time."""
    kept: dict[bool, dict[int, Tensor]] = {False: {}, True: {}}
    plain = {
        on: pair.log_probs(
            batch.sequences,
            batch.positions,
            adapter=on,
            edits={i: _keeper(kept[on], i, vectors[:, i]) for i in pair.layers},
        )
        for on in kept
    }

    def left(on: bool, j: int) -> float:
        edits = {i: _restorer(vectors[j, i], kept[not on][i][..., j]) for i in pair.layers}
        changed = pair.log_probs(batch.sequences, batch.positions, adapter=on, edits=edits)
        return divergence(plain[not on], changed)

    return Exchange(
        divergence(plain[False], plain[True]),
        divergence(plain[True], plain[False]),
        [left(True, j) for j in range(len(vectors))],
        [left(False, j) for j in range(len(vectors))],
    )


def _part_gone(left: float, whole: float) -> float:
    return 1 - left / whole if whole else 0.0


def steering(
    pair: Pair,
    batches: Sequence[Batch],
    layer: int,
    vectors: Tensor,
    length: float,
    score: Callable[[Batch, Tensor, Tensor], float],
) -> dict[float, list[float]]:
    """Dose -> mean over batches of `score(batch, base, steered)` by candidate `[J, D]`."""
    totals = {dose: [0.0] * len(vectors) for dose in DOSES}
    count = sum(len(batch.positions) for batch in batches)
    for batch in batches:
        base = pair.log_probs(batch.sequences, batch.positions, adapter=False)
        for dose, values in totals.items():
            for j, vector in enumerate(vectors):
                edits = {layer: _adder(dose * length * vector)}
                moved = pair.log_probs(batch.sequences, batch.positions, adapter=False, edits=edits)
                values[j] += score(batch, base, moved) * len(batch.positions) / count
    return totals


def promotion(tokens: Tensor) -> Callable[[Batch, Tensor, Tensor], float]:
    """Score of a steered forward: change of the probability of all given tokens together."""

    def score(_batch: Batch, base: Tensor, moved: Tensor) -> float:
        ids = tokens.to(base.device)
        return (moved[:, ids].exp() - base[:, ids].exp()).sum(dim=1).mean().item()

    return score


def likelihood(batch: Batch, base: Tensor, moved: Tensor) -> float:
    """Score of a steered forward: change of the mean log probability of the next tokens."""
    targets = batch.targets.to(base.device)[:, None]
    return (moved.gather(1, targets) - base.gather(1, targets)).mean().item()


def strongest_layer(signed: Sequence[float], stream: Sequence[float]) -> int:
    """Where to steer: the block with the largest movement relative to the stream.

    Not the last one, whose output only the unembedding sees.
    """
    relative = [abs(a) / max(b, 1e-12) for a, b in zip(signed, stream, strict=True)]
    candidates = relative[:-1] if len(relative) > 1 else relative
    return candidates.index(max(candidates))


def against_random(values: Sequence[float]) -> dict[str, Any]:
    """The first value beside those of random directions.

    Returns:
        value; random: mean and largest of the others; z: distance from their mean in standard
        deviations; p: part of all, the value itself included, that is at least as large.
    """
    value, *others = values
    spread = stdev(others) if len(others) > 1 else 0.0
    return {
        "value": value,
        "random_mean": mean(others),
        "random_max": max(others),
        "z": (value - mean(others)) / spread if spread else None,
        "p": (1 + sum(other >= value for other in others)) / (1 + len(others)),
    }


def _adder(step: Tensor) -> Edit:
    return lambda stream: stream + step.to(stream)


def _keeper(kept: dict[int, Tensor], layer: int, vectors: Tensor) -> Edit:
    """Keeps the components `[B, T, J]` along `[J, D]`, and nothing else, of a block's output."""

    def keep(stream: Tensor) -> None:
        kept[layer] = stream.float() @ vectors.to(stream.device).mT

    return keep


def _restorer(vector: Tensor, wanted: Tensor) -> Edit:
    """Gives the stream the wanted component `[B, T]` along `[D]`."""

    def restore(stream: Tensor) -> Tensor:
        own = vector.to(stream.device)
        missing = wanted - stream.float() @ own
        return stream + (missing[..., None] * own).to(stream.dtype)

    return restore
