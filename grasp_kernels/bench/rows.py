"""Rows of the benchmark on disk, and the table made from them."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from grasp_kernels.files import whole_file
from grasp_kernels.version import __version__

Row = dict[str, Any]


def environment() -> Row:
    """What a row needs to be compared with another: machine, versions, commit."""
    import peft

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "grasp_kernels": __version__,
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.is_file() else []
    found = (line.split(":", 1)[1].strip() for line in names if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The commit of a source checkout, with "+" when files differ from it; None elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def write_rows(path: str | PathLike[str], rows: Iterable[Row]) -> None:
    """One JSON object a line, the file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: str | PathLike[str]) -> list[Row]:
    """Raises FileNotFoundError or ValueError with the line that is not a row."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r} with benchmark rows.")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            row["provider"], row["both"]["median"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {str(file)!r} is not a benchmark row ({error!r}); "
                "give a file that `grasp-kernels bench` wrote."
            ) from None
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: for each case the milliseconds of every provider, and its ratio to stock peft."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["model"], row["linear"], row["dtype"], row["T"], row["K"], row["N"])
        cases.setdefault(key, {})[row["provider"]] = row
    lines = [
        "| model | linear | dtype | T | K→N | " + " | ".join(providers) + " |",
        "|---|---|---|---|---|" + "---|" * len(providers),
    ]
    for (model, linear, dtype, T, K, N), found in cases.items():
        cells = [_cell(found.get(name), found.get("peft")) for name in providers]
        lines.append(
            f"| {model} | {linear} | {dtype} | {T} | {K}→{N} | " + " | ".join(cells) + " |"
        )
    for (model, dtype, T), sums in _layer_totals(rows, providers).items():
        cells = [_total_cell(sums.get(name), sums.get("peft")) for name in providers]
        lines.append(f"| {model} | **all** | {dtype} | {T} | | " + " | ".join(cells) + " |")
    environment = {k: rows[0][k] for k in ("device", "threads", "torch", "peft", "commit")}
    note = ", ".join(f"{name} {value}" for name, value in environment.items())
    return "\n".join(
        [*lines, "", f"Milliseconds, forward + backward, median (ratio to peft). {note}."]
    )


def _layer_totals(rows: list[Row], providers: list[str]) -> dict[tuple[Any, ...], dict[str, float]]:
    totals: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        sums = totals.setdefault(
            (row["model"], row["dtype"], row["T"]), dict.fromkeys(providers, 0.0)
        )
        sums[row["provider"]] += row["both"]["median"] if row["refused"] is None else float("nan")
    return totals


def _cell(row: Row | None, stock: Row | None) -> str:
    if row is None:
        return "–"
    if row["refused"] is not None:
        return "wrong"
    return _total_cell(row["both"]["median"], stock["both"]["median"] if stock else None)


def _total_cell(value: float | None, stock: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.2f}" + (f" ({value / stock:.2f})" if stock else "")
