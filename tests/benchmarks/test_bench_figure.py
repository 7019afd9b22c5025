"""The figure of time by tokens is drawn from the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kernels.figure import draw, ratios
from benchmarks.kernels.rows import Row


def row(provider: str, T: int, median: float, **other: str) -> Row:
    kind = {"level": "linear", "dtype": "bfloat16", **other}
    return {**kind, "provider": provider, "T": T, "both": {"median": median}}


def test_a_ratio_is_that_of_the_sums_over_all_linears() -> None:
    rows = [
        *(row("peft", 512, 1.0), row("peft", 512, 3.0), row("peft", 64, 2.0)),
        *(row("ours", 512, 1.0), row("ours", 512, 1.0), row("ours", 64, 3.0)),
        *(row("ours", 512, 9.0, dtype="float32"), row("ours", 512, 9.0, level="step")),
    ]
    assert ratios(rows, "linear", "ours") == pytest.approx({64: 1.5, 512: 0.5})


def test_the_figure_of_the_docs_is_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
