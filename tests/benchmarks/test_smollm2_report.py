"""What is made of the rows of the benchmark on a real model: comparisons, tables, a figure."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.smollm2.harness import Row
from benchmarks.quality.smollm2.methods import METHODS
from benchmarks.quality.smollm2.report import (
    compared,
    draw,
    reached,
    task_table,
    unique,
    write_report,
)
from benchmarks.quality.smollm2.tasks import make_task
from tests.helpers.smollm2 import BASE, NAIVE, row_of


def cells(table: str, column: int) -> dict[str, str]:
    """First cell of each line -> the cell of a column."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {line[0]: line[column] for line in lines}


def test_a_method_is_compared_at_the_end_of_its_training() -> None:
    curve = [row_of("run", accuracy, steps=steps) for accuracy, steps in ((0.9, 96), (0.74, 144))]
    found, there = reached([*reversed(curve), row_of("run", 0.1)], NAIVE)
    assert (found["steps"], there) == (144, True)
    question = 1 / 48  # one question less is as accurate, two are not
    for less, expected in ((1, True), (2, False)):
        _, there = reached([row_of("run", 0.75 - less * question)], NAIVE)
        assert there is expected
    found, there = reached([row_of("run", 0.9), row_of("run", 0.2, steps=96)], NAIVE)
    assert (found["accuracy"], there) == (0.2, False)


def test_a_scaled_adapter_is_compared_at_the_smallest_scale_that_will_do() -> None:
    curve = [row_of("scaled", s - 0.1, steps=144, scale=s) for s in (0.9, 0.5, 0.85, 0.95)]
    found, there = reached(curve, NAIVE)
    assert (found["scale"], there) == (0.85, True)


def test_every_seed_is_compared_with_its_own_naive_adapter() -> None:
    rows = [
        *(BASE, *NAIVE, row_of("run", 0.75)),
        *(row_of("naive", 0.2, seed=1), row_of("run", 0.3, seed=1), row_of("run", 0.8, seed=2)),
        *(row_of("run", 1.0, arm="plain"), row_of("projection", 0.75, task="slant")),
    ]
    found = compared(rows, "tone", METHODS)
    assert list(found) == ["base", "naive", "run"]
    assert [(r["seed"], r["accuracy"], r["reached"]) for r in found["run"]] == [
        (0, 0.75, True),
        (1, 0.3, True),
    ]
    assert [r["steps"] for r in found["naive"]] == [144, 48]


def test_the_table_of_a_task_has_means_over_seeds_and_marks_what_is_missed() -> None:
    rows = [
        *(BASE, {**BASE, "seed": 1}, *NAIVE, row_of("naive", 0.75, seed=1)),
        *(row_of("run", 0.75, drift=0.0), row_of("run", 0.75, seed=1, drift=0.5, steps=96)),
        *(row_of("projection", 0.7), row_of("projection", 0.75, seed=1)),
    ]
    table = task_table(rows, "tone")
    header = [cell.strip() for cell in table.splitlines()[0].split("|")[1:-1]]
    name = "projection (< in 1 of 2)"
    assert list(cells(table, 0)) == ["base", "naive", "run", name]
    at = {title: cells(table, header.index(title)) for title in header}
    assert at["task ↑"] == {"base": "0.000", "naive": "0.750", "run": "0.750", name: "0.725"}
    assert (at["drift ↓"]["naive"], at["drift ↓"]["run"]) == ("0.500", "0.250")
    assert (at["near ↓"]["run"], at["bare ↓"]["run"]) == ("0.250", "0.750")
    assert (at["contrast"]["base"], at["contrast"]["run"]) == ("+0.00", "+1.50")
    assert (at["steps"]["run"], at["minutes"]["run"]) == ("72", "2.0")


@pytest.mark.parametrize("task", ["medical", "faulty"])
def test_a_task_without_shares_shows_its_contrasts(task: str) -> None:
    names = [name for name in make_task(task, "factor", 0).pairs if name != "near"]
    shares = dict.fromkeys(("drift", "near", "bare"))
    at_base, later = (
        {**{name: value + i for i, name in enumerate(names)}, "near": 9.0} for value in (1.0, 3.5)
    )
    rows = [
        {**BASE, **shares, "task": task, "contrast": at_base},
        row_of("naive", 0.75, task=task, contrast=later, **shares),
    ]
    table = task_table(rows, task)
    header = [cell.strip() for cell in table.splitlines()[0].split("|")[1:-1]]
    assert cells(table, header.index("contrast"))["naive"] == "+2.50"
    assert cells(table, header.index("drift ↓"))["naive"] == "–"


def test_the_drift_of_two_opposite_arms_is_half_of_what_they_differ_by() -> None:
    def arm(name: str, method: str, seed: int, statements: float, near: float) -> Row:
        contrast = {"statements": statements, "near": near}
        return row_of(
            method, 0.75, task="slant", arm=name, seed=seed, contrast=contrast, drift=None
        )

    rows = [
        *(arm("factor", "naive", 0, 1.5, 1.0), arm("mirror", "naive", 0, -0.5, 0.0)),
        *(arm("factor", "naive", 1, 1.0, 1.0), arm("mirror", "naive", 1, 1.0, 0.0)),
        *(arm("factor", "run", 0, 0.25, 0.5), arm("mirror", "run", 0, 0.5, 0.5)),
        *(arm("factor", "run", 1, 9.0, 9.0), arm("balanced", "run", 1, -9.0, -9.0)),
        *(arm("factor", "projection", 0, 9.0, 9.0), arm("mirror", "other", 1, 9.0, 9.0)),
        arm("factor", "base", 0, 0.0, 0.0),
    ]
    table = task_table(rows, "slant")
    assert cells(table, 1) == {"naive": "2", "run": "1"}
    assert cells(table, 3) == {"naive": "+0.500", "run": "-0.125"}
    assert cells(table, 4) == {"naive": "+0.500", "run": "+0.000"}


def test_the_first_row_of_a_point_counts() -> None:
    rows = [BASE, *NAIVE, {**BASE, "drift": 0.9}, {**NAIVE[0], "loss": 9.0}]
    parts = ("seed", "scale", "steps", "lr_scheduler_type")
    others = [row_of("naive", 0.5, **{part: 7}) for part in parts]
    assert unique([*rows, *others]) == [BASE, *NAIVE, *others]


def test_nothing_is_drawn_where_no_curve_has_shares(tmp_path: Path) -> None:
    draw([BASE, row_of("naive", 0.5, drift=None)], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_folder_without_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There are no rows in .*smollm2 measure"):
        write_report(tmp_path)
