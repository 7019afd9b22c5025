"""What the pages say of the real model is what its rows say."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.quality.smollm2.harness import read_rows
from benchmarks.quality.smollm2.methods import METHODS, RETIRED
from benchmarks.quality.smollm2.report import at_schedule, task_table, unique, write_report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "quality" / "results" / "smollm2"


def test_the_front_page_has_the_tables_of_the_rows() -> None:
    rows = at_schedule(unique(read_rows(RESULTS / "rows.jsonl")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for task in ("tone", "slant"):
        assert task_table(rows, task) in readme


def test_the_report_is_made_of_the_rows(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "verdicts.jsonl"):
        shutil.copy(RESULTS / name, tmp_path)
    write_report(tmp_path)
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert written == (RESULTS / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_row_says_where_it_was_measured() -> None:
    for row in read_rows(RESULTS / "rows.jsonl"):
        assert row["method"] in {*METHODS, *RETIRED, "base"}
        for part in ("torch", "device", "threads", "dtype", "commit", "base", "lr_scheduler_type"):
            assert row[part]
