"""The training records on whose answers the adapter moves the stream most along a direction.

Shapes: `L` blocks, `M` records, `D` residual width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from grasp_kernels.data import Record
from grasp_kernels.diagnosis.movement import Moved, relative_movement

_SHOWN_CHARACTERS = 120


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
