"""The movement of the residual stream by an adapter, its direction, and the records that move most.

Prompts that are unrelated to the training data should not all move in one direction at the tokens
of their answers. Narrow fine-tuning is known to leave such traces (Minder et al. 2025,
arXiv 2510.13900).

Shapes: `L` blocks, `M` sequences or records, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.data import Record
from grasp_kernels.diagnosis.pair import Pair
from grasp_kernels.models.frozen_model import stream_means

_SHOWN_CHARACTERS = 120


@dataclass(frozen=True)
class Moved:
    """Hold the change of the stream by the adapter after each block, float32 on the CPU.

    Each vector is a mean over the chosen tokens of a sequence.
    """

    delta: Tensor  # [L, M, D], adapter on minus adapter off
    base: Tensor  # [L, M], length of the base model's stream

    def relative(self, vectors: Tensor) -> Tensor:
        """Return the signed movement `[L, M]` along unit vectors `[L, D]` per stream length."""
        along = torch.einsum("lmd,ld->lm", self.delta, vectors)
        tiny = torch.finfo(self.base.dtype).tiny
        return along / self.base.mean(dim=1, keepdim=True).clamp_min(tiny)


def measure_moved(
    pair: Pair,
    sequences: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    progress: str | None = None,
) -> Moved:
    """Measure the movement, averaged over the positions [start, end) of each sequence."""

    def stream(adapter: bool) -> Tensor:
        with pair.switched(adapter):
            label = progress and f"{progress}, adapter {'on' if adapter else 'off'}"
            return stream_means(
                pair.base, pair.blocks, sequences, spans, batch_size=batch_size, progress=label
            )

    base = stream(adapter=False)
    return Moved(stream(adapter=True) - base, base.norm(dim=-1))


@dataclass(frozen=True)
class Direction:
    """Hold unit vectors `[L, D]`, one for each block, float32, in the sense of the movement.

    `folds` is for tests on sequences that were not used to find the direction. It has pairs: unit
    vectors `[L, D]`, and the indices of the sequences to test them on.
    """

    vectors: Tensor
    folds: tuple[tuple[Tensor, list[int]], ...]


def mean_direction(moved: Moved) -> Direction | None:
    """Return the mean movement in each block; None if nothing moves.

    Each half of the sequences is tested with the direction of the other half.
    """
    if not bool(moved.delta.any()):
        return None
    everything = list(range(moved.delta.shape[1]))
    halves = (everything[::2], everything[1::2])
    folds = tuple((_mean(moved, halves[1 - i]), halves[i]) for i in (0, 1))
    return Direction(_mean(moved, everything), folds)


def _mean(moved: Moved, chosen: list[int]) -> Tensor:
    """Return the unit vectors `[L, D]` of the mean movement of chosen sequences.

    A block before the first adapted block moves nothing: it gets the direction of the next block.
    """
    mean = moved.delta[:, chosen].mean(dim=1)
    lengths = mean.norm(dim=1, keepdim=True)
    vectors = mean / lengths.clamp_min(torch.finfo(mean.dtype).tiny)
    for layer in reversed(range(len(vectors) - 1)):
        if lengths[layer] == 0:
            vectors[layer] = vectors[layer + 1]
    return vectors


def most_moved(
    moved: Moved, vectors: Tensor, records: list[tuple[int, Record]], count: int
) -> list[dict[str, Any]]:
    """Return the records that move most along unit vectors `[L, D]`, the largest first.

    Args:
        records: number of each record in the data (from 1), and the record, in the order of
            `moved`.
    """
    along = moved.relative(vectors).mean(dim=0)
    order = along.argsort(descending=True)[:count].tolist()
    return [
        {"record": records[i][0], "movement": along[i].item(), **_shown(records[i][1])}
        for i in order
    ]


def _shown(record: Record) -> dict[str, str]:
    """Return the first learned answer and the turn before it, both cut."""
    if "text" in record:
        return {"prompt": "", "answer": _cut(record["text"])}
    turns = record["messages"]
    first = next(
        i
        for i, turn in enumerate(turns)
        if turn["role"] == "assistant" and i >= record.get("context", 0)
    )
    prompt = turns[first - 1]["content"] if first else ""
    return {"prompt": _cut(prompt), "answer": _cut(turns[first]["content"])}


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"
