"""From benchmark rows to the table by which `backend="auto"` chooses.

Shapes: T tokens, K in, N out, R LoRA rank, Q write basis size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike
from typing import Any

from grasp_kernels.bench.rows import Row
from grasp_kernels.files import whole_file
from grasp_kernels.ops.lora_linear import measured

_SIZES = ("device", "dtype", "T", "K", "N", "R", "Q")


def adopt(rows: Iterable[Row], table: str | PathLike[str] = measured.TABLE) -> int:
    """Write the rows of backends by name, measured on GPUs, into the table; returns their number.

    A new measurement of a shape replaces the old one. A backend whose results were wrong, or that
    failed, is left out of its shape.

    Raises:
        ValueError: no row tells a backend's time on a GPU beside that of `aten`.
    """
    found = [entry for entry in _entries(rows) if len(entry["milliseconds"]) > 1]
    if not found:
        raise ValueError(
            "no row compares a kernel with aten on a GPU; measure with `grasp-kernels bench "
            f"--providers all --tokens {2 * measured.LEAST_TOKENS}` on a machine with one."
        )
    with open(table, encoding="utf-8") as text:
        kept = {_key(entry): entry for entry in json.load(text)["rows"]}
    kept |= {_key(entry): entry for entry in found}
    entries = sorted(kept.values(), key=lambda entry: list(map(str, _key(entry))))
    with whole_file(table) as partial:
        lines = ",\n".join(json.dumps(entry) for entry in entries)
        partial.write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")
    return len(found)


def _entries(rows: Iterable[Row]) -> list[dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        backend = row["backend"]
        median = row["both"]["median"]
        on_gpu = row["capability"] is not None
        if row["level"] != "linear" or backend in (None, "auto") or median is None or not on_gpu:
            continue
        if row["provider"] not in (f"grasp-{backend}", f"grasp-{backend}-projected"):
            continue  # another form of the backend, such as padded weights
        if row["T"] < measured.LEAST_TOKENS:
            continue  # nobody asks for it
        projected = row["projects"] and row["writes"]  # readers have no basis
        entry = {**{name: row[name] for name in _SIZES}, "Q": row["Q"] if projected else 0}
        entry = found.setdefault(_key(entry), {**entry, "milliseconds": {}})
        entry["milliseconds"][backend] = median
    return [entry for entry in found.values() if "aten" in entry["milliseconds"]]


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in _SIZES)
