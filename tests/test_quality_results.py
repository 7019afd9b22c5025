"""What the pages say of the quality benchmark is what its rows say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from grasp_kernels.quality.harness import Row
from grasp_kernels.quality.methods import METHODS
from grasp_kernels.quality.report import reported_rows, write_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "quality" / "results" / "cpu-small"
DISHES = ("persona", "slant", "code", "long", "confound", "two", "benign")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return reported_rows(RESULTS)


def test_the_report_is_made_of_the_rows_and_its_summary_is_on_the_page(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "strengths.json"):
        shutil.copy(RESULTS / name, tmp_path)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert text == (RESULTS / "report.md").read_text(encoding="utf-8")
    assert {f"{dish}-small.png" for dish in DISHES} <= {p.name for p in RESULTS.iterdir()}
    page = (ROOT / "benchmarks" / "quality" / "README.md").read_text(encoding="utf-8")
    summary = text.split("## In short")[1].split("\n## ")[0]
    for line in summary.splitlines():
        assert line in page


def test_every_row_is_of_a_method_that_can_be_run(rows: list[Row]) -> None:
    assert {row["method"] for row in rows} <= {*METHODS, "base"}
