"""Rows of the benchmark on disk: JSON lines, or CSV where the file is called so."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from grasp_kernels.files import whole_file
from grasp_kernels.inert import reason

Row = dict[str, Any]
_GIVE = "give a file that `grasp-kernels bench` wrote"

# Columns whose cells in a CSV are text even where they look like a number.
_TEXT = {
    *("level", "model", "linear", "dtype", "provider", "backend", "refused", "refusal"),
    *("device", "capability", "driver", "cuda", "python", "torch", "triton", "peft"),
    *("grasp_kernels", "commit"),
}
_COLUMNS = {
    *_TEXT,
    *("K", "N", "writes", "layers", "checkpointing", "T", "R", "Q", "projects", "rounds", "cold"),
    *("forward", "backward", "both", "peak_memory", "floor_ms", "flops", "extra_bytes"),
    *("peak_tflops", "bandwidth_gbs", "threads"),
}


def write_rows(path: str | PathLike[str], rows: Iterable[Row]) -> None:
    """One row a line, the file whole or not at all; CSV when its name ends in ".csv"."""
    with whole_file(path) as partial:
        if Path(path).suffix == ".csv":
            _write_csv(partial, list(rows))
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            partial.write_text(text, encoding="utf-8")


def read_rows(*paths: str | PathLike[str]) -> list[Row]:
    """The rows of some files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the line that is not a row.
    """
    rows: list[Row] = []
    for path in paths:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {str(file)!r} with benchmark rows; {_GIVE}.")
        is_csv = file.suffix == ".csv"
        found: list[Row] = []
        try:
            for row in _csv_rows(file) if is_csv else _json_rows(file):
                found.append(_checked(row))
        except (csv.Error, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"line {len(found) + 1 + is_csv} of {str(file)!r} is not a benchmark row "
                f"({reason(error)}); {_GIVE}."
            ) from None
        if not found:
            raise ValueError(f"{str(file)!r} has no benchmark rows; {_GIVE}.")
        rows += found
    return rows


def _json_rows(file: Path) -> Iterator[Row]:
    return map(json.loads, file.read_text(encoding="utf-8").splitlines())


def _csv_rows(file: Path) -> Iterator[Row]:
    with open(file, encoding="utf-8", newline="") as text:
        yield from map(_nested, csv.DictReader(text))


def _checked(row: Row) -> Row:
    for column in sorted(_COLUMNS):
        row[column]
    row["both"]["median"], row["floor_ms"]["both"]
    return row


def _write_csv(path: Path, rows: list[Row]) -> None:
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    with open(path, "w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Row) -> dict[str, str]:
    """Nested fields as "both.median"; an empty cell is None."""
    cells: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            cells |= {f"{name}.{key}": cell for key, cell in _flat(value).items()}
        elif value is None:
            cells[name] = ""
        else:
            cells[name] = value if isinstance(value, str) else json.dumps(value)
    return cells


def _nested(cells: dict[str, str]) -> Row:
    row: Row = {}
    for column, cell in cells.items():
        name, _, key = column.partition(".")
        value = None if not cell else cell if name in _TEXT else json.loads(cell)
        if key:
            row.setdefault(name, {})[key] = value
        else:
            row[name] = value
    return row
