"""Rows of the benchmark on disk, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from grasp_kernels.files import whole_file
from grasp_kernels.inert import reason

Row = dict[str, Any]

_COLUMNS = (
    *("level", "model", "linear", "K", "N", "writes", "layers", "checkpointing", "dtype"),
    *("T", "R", "Q", "provider", "projects", "backend", "refused", "refusal", "rounds"),
    *("forward", "backward", "both", "peak_memory", "floor_ms", "flops", "extra_bytes"),
    *("peak_tflops", "bandwidth_gbs", "device", "capability", "driver", "threads", "cuda"),
    *("python", "torch", "triton", "peft", "grasp_kernels", "commit"),
)


def write_rows(path: str | PathLike[str], rows: Iterable[Row]) -> None:
    """One row a line, the file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(*paths: str | PathLike[str]) -> list[Row]:
    """The rows of some files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the line that is not a row.
    """
    rows = []
    for path in paths:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {str(file)!r} with benchmark rows.")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(_checked(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {str(file)!r} is not a benchmark row ({reason(error)}); "
                    "give a file that `python -m benchmarks.kernels` wrote."
                ) from None
    return rows


def _checked(row: Row) -> Row:
    for column in _COLUMNS:
        row[column]
    row["both"]["median"], row["floor_ms"]["both"]
    return row
