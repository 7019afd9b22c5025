"""How far an adapter moves the residual stream, as a whole and along directions, and where most.

Shapes: `L` blocks, `M` sequences or records, `D` residual width, `J` random directions, `F` sign
flips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.data import Record
from grasp_kernels.effect.pair import Pair
from grasp_kernels.models.frozen_model import stream_means

_FLIPS = 999  # smallest p-value 0.001
_SHOWN_CHARACTERS = 120


@dataclass(frozen=True)
class Moved:
    """What the adapter adds to the stream after each block, float32 on the CPU.

    Each vector is a mean over the tokens that were asked for.
    """

    delta: Tensor  # [L, M, D], adapter on minus adapter off
    base: Tensor  # [L, M], length of the base model's stream

    def along(self, vectors: Tensor) -> Tensor:
        """Signed movement `[L, M]` along unit vectors `[L, D]`."""
        return torch.einsum("lmd,ld->lm", self.delta, vectors)


def measure_moved(
    pair: Pair,
    sequences: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    progress: str | None = None,
) -> Moved:
    """Movement averaged over the positions [start, end) of each sequence."""

    def stream(adapter: bool) -> Tensor:
        with pair.switched(adapter):
            label = progress and f"{progress}, adapter {'on' if adapter else 'off'}"
            return stream_means(
                pair.base, pair.blocks, sequences, spans, batch_size=batch_size, progress=label
            )

    base = stream(adapter=False)
    return Moved(stream(adapter=True) - base, base.norm(dim=-1))


def movement_along(moved: Moved, vectors: Tensor, random: Tensor) -> dict[str, Any]:
    """Lengths by layer, means over the sequences.

    Args:
        vectors: unit vectors `[L, D]`.
        random: unit vectors `[J, D]` to compare with.

    Returns:
        signed: along the direction, with its sign; size: without it; random: the same size along
        the random directions; total: of the whole movement; stream: of the base model's stream.
    """
    along = moved.along(vectors)
    by_chance = torch.einsum("lmd,jd->lmj", moved.delta, random).abs().mean(dim=(1, 2))
    return {
        "signed": along.mean(dim=1).tolist(),
        "size": along.abs().mean(dim=1).tolist(),
        "random": by_chance.tolist(),
        "total": moved.delta.norm(dim=-1).mean(dim=1).tolist(),
        "stream": moved.base.mean(dim=1).tolist(),
    }


def relative_movement(moved: Moved, vectors: Tensor) -> Tensor:
    """Signed movement `[M]` along unit vectors `[L, D]`: mean over blocks, each relative to the
    mean length of the base model's stream there."""
    tiny = torch.finfo(moved.base.dtype).tiny
    return (moved.along(vectors) / moved.base.mean(dim=1, keepdim=True).clamp_min(tiny)).mean(dim=0)


def consistency(delta: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Test whether sequences move together: by the length of their mean movement.

    Args:
        delta: movement `[L, M, D]`.

    Returns:
        sign_flip: length of the mean relative to the root mean square length of the movements, root
            mean square over blocks (1: all move alike); null_95 of the same after random signs of
            the sequences; p_value; flips.
        halves: median over blocks of the cosine between the means of two disjoint halves.
    """
    n_layers, n_sequences, _ = delta.shape
    signs = _random_signs(n_sequences, generator)
    order = torch.randperm(n_sequences, generator=generator, device=generator.device).cpu()
    halves = (order[: n_sequences // 2], order[n_sequences // 2 :])
    length, null, cosines = 0.0, torch.zeros(_FLIPS, dtype=torch.float64), []
    for moved in delta.double():
        gram = moved @ moved.mT
        scale = max(gram.trace().item() / n_sequences, torch.finfo(torch.float64).tiny) * n_layers
        length += moved.mean(dim=0).square().sum().item() / scale
        null += ((signs @ gram) * signs).sum(dim=1) / n_sequences**2 / scale
        one, other = (moved[half].mean(dim=0) for half in halves)
        cosines.append(torch.nn.functional.cosine_similarity(one, other, dim=0).item())
    return {
        "sign_flip": {
            "length": length**0.5,
            "null_95": null.quantile(0.95).sqrt().item(),
            "p_value": (1 + int((null >= length).sum())) / (1 + _FLIPS),
            "flips": _FLIPS,
        },
        "halves": median(cosines),
    }


def _random_signs(count: int, generator: torch.Generator) -> Tensor:
    """`[F, M]` of ±1."""
    shape = (_FLIPS, count)
    bits = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return (2 * bits - 1).cpu().double()


def random_directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Unit vectors `[J, D]`, drawn alike in every direction."""
    drawn = torch.randn(count, width, generator=generator, device=generator.device).cpu()
    return drawn / drawn.norm(dim=1, keepdim=True)


def most_moved(
    moved: Moved, vectors: Tensor, records: list[tuple[int, Record]], count: int
) -> list[dict[str, Any]]:
    """The records that move most along the direction, in the direction's own sense first.

    Args:
        records: number of each record in the data (from 1), and the record, in the order of
            `moved`.
    """
    along = relative_movement(moved, vectors)
    order = along.argsort(descending=True)[:count].tolist()
    return [
        {"record": records[i][0], "movement": along[i].item(), **_shown(records[i][1])}
        for i in order
    ]


def _shown(record: Record) -> dict[str, str]:
    """The last question and the first answer after it, cut."""
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
