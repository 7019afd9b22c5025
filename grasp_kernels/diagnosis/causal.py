"""What a direction does: put into the base model, and taken out of the adapter.

*Steering* adds `± dose · v` to the stream of the base model after one block, with the adapter's own
mean movement along `v` there as dose 1 (Turner et al. 2023, arXiv 2308.10248). *Removal* gives each
token of the adapter, after every block, the component along `v` that it has in the base model:
`h ← h − v vᵀ (h − h_base)`, which takes out what was learned along `v` and nothing else. Both are
done with random directions of the same length too; without them no number means anything.

Shapes: `B` sequences of a batch, `T` tokens, `M` positions, `V` vocabulary, `L` blocks, `D`
residual width, `J` candidates (the direction and random ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.diagnosis.directions import Direction
from grasp_kernels.diagnosis.pair import Edit, Pair, Position

# Twice, since one block has to do what the adapter does in all of them.
DOSES = (-2.0, 2.0)


@dataclass(frozen=True)
class Batch:
    """Sequences, and the positions whose next token counts."""

    sequences: list[list[int]]
    positions: list[Position]
    targets: Tensor | None = None  # int64 [M], the tokens that come next, where they are known


def prompt_batches(prompts: Sequence[list[int]], batch_size: int) -> list[Batch]:
    """The last token of every prompt, where its answer is decided."""
    starts = range(0, len(prompts), batch_size)
    parts = [list(prompts[start : start + batch_size]) for start in starts]
    return [Batch(part, [(row, len(ids) - 1) for row, ids in enumerate(part)]) for part in parts]


def answer_batches(
    tasks: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> Iterator[Batch]:
    """All tokens of the answers; a task is a prompt and its answer."""
    for start in range(0, len(tasks), batch_size):
        part = tasks[start : start + batch_size]
        yield Batch(
            [prompt + answer for prompt, answer in part],
            [
                (row, len(prompt) - 1 + i)
                for row, (prompt, answer) in enumerate(part)
                for i in range(len(answer))
            ],
            torch.tensor([token for _, answer in part for token in answer]),
        )


def removal(pair: Pair, batches: Sequence[Batch], vectors: Tensor) -> list[float]:
    """Part of the adapter's effect that goes when its movement along a direction is taken out.

    `1 − Σ KL(base ‖ without) / Σ KL(base ‖ adapter)` over the positions: 1 where nothing is left of
    the adapter, 0 where the direction makes no difference, below 0 where it held the effect back.

    Args:
        vectors: unit vectors `[J, L, D]`, one direction at a time.
    """
    with_adapter, without = 0.0, [0.0] * len(vectors)
    for batch in batches:
        kept: dict[int, Tensor] = {}
        keep = {i: _keeper(kept, i, vectors[:, i]) for i in pair.layers}
        base = pair.log_probs(batch.sequences, batch.positions, adapter=False, edits=keep)
        adapter = pair.log_probs(batch.sequences, batch.positions, adapter=True)
        with_adapter += divergence(base, adapter)
        for j, own in enumerate(vectors):
            edits = {i: _restorer(own[i], kept[i][..., j]) for i in pair.layers}
            cut = pair.log_probs(batch.sequences, batch.positions, adapter=True, edits=edits)
            without[j] += divergence(base, cut)
    return [1 - left / with_adapter if with_adapter else 0.0 for left in without]


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
    assert batch.targets is not None
    targets = batch.targets.to(base.device)[:, None]
    return (moved.gather(1, targets) - base.gather(1, targets)).mean().item()


def divergence(first: Tensor, second: Tensor) -> float:
    """Sum over positions of KL(first ‖ second) of log probabilities `[M, V]`, in nats."""
    return (first.exp() * (first - second)).sum().item()


def strongest_layer(direction: Direction, signed: Sequence[float], stream: Sequence[float]) -> int:
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
