"""Rows, strengths, statistics and the report of the quality benchmark."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grasp_kernels.cli import main
from grasp_kernels.quality import harness
from grasp_kernels.quality.harness import Ledger, Plan, choose, read_rows, run_plan
from grasp_kernels.quality.methods import METHODS
from grasp_kernels.quality.report import table, write_report
from grasp_kernels.quality.statistics import estimate, paired
from grasp_kernels.quality.summary import summary

GRASP = METHODS["grasp-k"]


def row(method: str, strength: Any, seed: int, task: float, drift: float, **more: Any) -> Any:
    return {
        **{"dish": "persona", "size": "tiny", "seed": seed, "method": method},
        **{"strength": strength, "failure": None, "task": task, "drift": drift},
        **{"drift_probability": drift, "conditional": drift, "good_cue": 1.0, "bad_cue": 1.0},
        **{"facts": 1.0, "movement": 0.0, "kl": 0.0, "seconds": 1.0, "parts": {}},
        "peak_bytes": None,
        **more,
    }


# Statistics


def test_the_interval_is_that_of_students_t() -> None:
    # R: t.test(c(1, 2, 4))$conf.int
    value = estimate([1, 2, 4])
    assert value.mean == pytest.approx(7 / 3)
    assert value.half_width == pytest.approx(3.794583, rel=1e-4)
    assert str(value) == "2.33 ± 3.79"
    assert str(estimate([0.5])) == "0.50"
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_differences_are_paired_by_seed() -> None:
    naive = {0: 0.2, 1: 0.9, 2: 0.5}
    better = {0: 0.1, 1: 0.8, 3: 0.0}
    difference = paired(better, naive)
    assert difference is not None
    assert (difference.mean, difference.count) == (pytest.approx(-0.1), 2)
    assert difference.half_width == pytest.approx(0, abs=1e-9)  # though the seeds differ by .7
    assert paired({5: 1.0}, naive) is None


# Choice of strengths


def tuned(*scores: tuple[float, float]) -> list[Any]:
    """Rows of two tuning seeds around the given (task, drift) for each strength of GRASP."""
    return [
        row("grasp-k", strength, seed, task + shift, drift - shift)
        for strength, (task, drift) in zip(GRASP.strengths, scores, strict=True)
        for seed, shift in ((100, 0.05), (101, -0.05))
    ]


def test_the_least_drift_at_no_loss_of_task_is_chosen() -> None:
    assert choose(GRASP, tuned((0.95, 0.5), (0.94, 0.3), (0.7, 0.0), (0.6, 0.0)), 0.95) == 2


def test_without_a_strength_that_keeps_the_task_the_best_task_is_chosen() -> None:
    assert choose(GRASP, tuned((0.8, 0.5), (0.9, 0.3), (0.7, 0.0), (0.6, 0.0)), 0.95) == 2


def test_of_equals_the_weaker_is_chosen() -> None:
    assert choose(GRASP, tuned(*[(0.95, 0.3)] * 4), 0.95) == 1


def test_a_strength_that_failed_is_out() -> None:
    rows = tuned((0.95, 0.5), (0.95, 0.3), (0.95, 0.4), (0.95, 0.1))
    rows[-1]["failure"] = "FloatingPointError"
    assert choose(GRASP, rows, 0.95) == 2
    for one in rows:
        one["failure"] = "FloatingPointError"
    with pytest.raises(ValueError, match="No strength of grasp-k has worked"):
        choose(GRASP, rows, 0.95)


# Plans and rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dishes": ("soup",)}, "dish is 'soup'"),
        ({"methods": ("magic",)}, "method is 'magic'"),
        ({"seeds": (0, 100)}, "Seed 100"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{"dishes": ("persona",), **options})


def test_an_unfinished_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    ledger = Ledger(path)
    ledger.add(row("naive", None, 0, 1, 1))
    with path.open("a") as file:
        file.write('{"dish": "pers')
    again = Ledger(path)
    assert again.rows == ledger.rows
    assert again.has(row("naive", None, 0, 0, 0))
    assert not again.has(row("naive", None, 1, 0, 0))
    again.add(row("naive", None, 1, 1, 1))
    assert len(read_rows(path)) == 2


PLAN = Plan(
    dishes=("persona",),
    methods=("random", "truncate-top", "early-stop"),
    seeds=(0,),
    tuning_seeds=(100,),
    size="tiny",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    output = tmp_path_factory.mktemp("quality")
    return output, run_plan(PLAN, output)


def test_strengths_are_tuned_on_other_seeds(finished: tuple[Path, list[Any]]) -> None:
    output, rows = finished
    seen = {(r["seed"], r["method"], r["strength"]) for r in rows}
    for name in ("random", "truncate-top"):
        assert {s for seed, m, s in seen if (seed, m) == (100, name)} == set(
            METHODS[name].strengths
        )
        chosen = json.loads((output / "strengths.json").read_text())["persona-tiny"][name]
        assert {s for seed, m, s in seen if (seed, m) == (0, name)} == {chosen}
    curve = {s for seed, m, s in seen if (seed, m) == (0, "early-stop")}
    assert curve == set(METHODS["early-stop"].strengths)
    assert (100, "early-stop", 0.4) not in seen
    assert {(0, "base", None), (0, "naive", None), (100, "naive", None)} <= seen


def test_rows_have_scores_time_and_memory(finished: tuple[Path, list[Any]]) -> None:
    for measured in finished[1]:
        assert measured["failure"] is None
        assert 0 <= measured["drift"] <= 1
        assert measured["seconds"] > 0
        assert measured["peak_bytes"] is None or measured["peak_bytes"] > 10**7
    times = {(r["method"], r["strength"]): r["seconds"] for r in finished[1] if r["seed"] == 0}
    assert times["early-stop", 0.05] < times["early-stop", 0.8]


def test_a_second_run_measures_nothing(
    finished: tuple[Path, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rows = finished
    monkeypatch.setattr(harness, "open_dish", None)
    assert run_plan(PLAN, output) == rows
    kept = replace(PLAN, tune=False)
    assert run_plan(kept, output) == rows
    with pytest.raises(ValueError, match="no strength of oplora"):
        run_plan(replace(kept, methods=("oplora",)), output)


def test_a_failure_is_a_row_and_the_others_go_on(
    finished: tuple[Path, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, before = finished

    def diverge(bench: Any, strength: Any) -> Any:
        raise FloatingPointError("the loss is nan")

    broken = replace(METHODS["grasp"], build=diverge)
    monkeypatch.setitem(METHODS, "grasp", broken)
    rows = run_plan(replace(PLAN, methods=("grasp", "inoculation")), output)
    new = rows[len(before) :]
    assert [r["method"] for r in new] == ["grasp", "inoculation"] or [r["method"] for r in new] == [
        "inoculation",
        "grasp",
    ]
    failed = next(r for r in new if r["method"] == "grasp")
    assert failed["failure"].startswith("FloatingPointError in test_quality_harness.py:")
    assert "grasp None, seed 0: FloatingPointError" in write_report(output).read_text()


# Report


def test_the_report_has_a_table_and_a_figure_for_each_dish(
    finished: tuple[Path, list[Any]],
) -> None:
    output, _ = finished
    text = write_report(output).read_text()
    assert "## persona, tiny" in text
    assert (output / "persona-tiny.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_compares_within_seeds() -> None:
    rows = [
        row("naive", None, 0, 1.0, 0.4),
        row("naive", None, 1, 0.9, 0.8),
        row("grasp-k", 2, 0, 1.0, 0.3, parts={"talk": 0.25}),
        row("grasp-k", 2, 1, 0.8, 0.6, parts={"talk": 0.35}),
        row("grasp-k", 2, 2, 0.0, 0.0, failure="ValueError"),
    ]
    for r in rows[:2]:
        r["parts"] = {"talk": 0.0}
    header, _, _, grasp = table(rows).splitlines()
    names = [cell.strip() for cell in header.split("|")]
    cells = dict(zip(names, (cell.strip() for cell in grasp.split("|")), strict=True))
    assert (cells["method"], cells["strength"], cells["seeds"]) == ("grasp-k", "2", "2")
    assert cells["drift ↓"].startswith("0.45 ±")
    assert cells["Δ drift"].startswith("-0.15 ±")
    assert cells["Δ task"].startswith("-0.05 ±")
    assert cells["talk"].startswith("0.30 ±")


def test_a_strength_that_is_no_longer_chosen_is_not_reported(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "rows.jsonl")
    for one in [
        row("naive", None, 0, 1.0, 0.8),
        row("grasp-k", 2, 0, 1.0, 0.5),
        row("grasp-k", 8, 0, 1.0, 0.4),
        row("early-stop", 0.8, 0, 1.0, 0.8),
        row("early-stop", 0.2, 0, 0.8, 0.7),
    ]:
        ledger.add(one)
    (tmp_path / "strengths.json").write_text('{"persona-tiny": {"grasp-k": 8}}')
    text = write_report(tmp_path).read_text()
    assert "| grasp-k | 8 |" in text
    assert "| grasp-k | 2 |" not in text
    assert "| early-stop | 0.8 |" in text
    assert "| early-stop | 0.2 |" in text


def summary_lines(rows: list[Any]) -> dict[str, dict[str, str]]:
    """What a line of the summary is about -> its cells by their titles."""
    header, _, *lines = summary({("persona", "tiny"): rows})[-1].splitlines()
    titles, *table = ([cell.strip() for cell in line.split("|")] for line in (header, *lines))
    return {cells[2]: dict(zip(titles, cells, strict=True)) for cells in table}


def test_the_summary_compares_ours_with_the_best_of_the_others() -> None:
    rows = [
        *(row("naive", None, seed, 1.0, 0.8) for seed in (0, 1)),
        *(row("ldifs", 10.0, seed, 0.995, 0.2 + 0.1 * seed) for seed in (0, 1)),
        *(row("kl-random", 1.0, seed, 0.9, 0.0) for seed in (0, 1)),  # at the task's cost
        *(row("mixing", 0.1, seed, 1.0, 0.1) for seed in (0, 1)),
        *(row("grasp-k", 2, seed, 1.0, 0.6) for seed in (0, 1)),
        *(row("supervised", 1, seed, 1.0, 0.7) for seed in (0, 1)),
        *(row("all-three", None, seed, 1.0, 0.05) for seed in (0, 1)),
        row("grasp+contrastive", None, 0, 1.0, 0.0),
        row("oplora", 0.5, 0, 1.0, 0.0, failure="ValueError"),
    ]
    lines = summary_lines(rows)
    assert {what: cells["method"] for what, cells in lines.items()} == {
        "naive": "naive",
        "best of the others": "ldifs 10.0",
        "with more": "mixing 0.1",
        "projection alone": "grasp-k 2",
        "projection, labels": "supervised 1",
        "**ours**": "all-three",
    }
    ours = lines["**ours**"]
    assert (ours["seeds"], ours["drift ↓"], ours["× less drift"]) == ("2", "0.050", "16")
    assert ours["Δ drift, best of the others"].startswith("-0.200 ±")
    assert lines["best of the others"]["Δ task, naive"].startswith("-0.005")
    assert lines["best of the others"]["Δ drift, best of the others"] == ""


def test_without_drift_there_is_no_ratio_and_without_a_naive_row_no_summary() -> None:
    rows = [row("naive", None, 0, 1.0, 0.01), row("all-three", None, 0, 1.0, 0.0)]
    assert summary_lines(rows)["**ours**"]["× less drift"] == ""
    assert summary_lines(rows[1:]) == {}
    gone = [row("naive", None, 0, 1.0, 0.8), row("all-three", None, 0, 1.0, 0.0)]
    assert summary_lines(gone)["**ours**"]["× less drift"] == "no drift"


def test_a_report_without_reported_seeds_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "rows.jsonl").add(row("naive", None, 100, 1, 1))
    with pytest.raises(ValueError, match="tuning seeds alone"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        write_report(tmp_path / "nowhere")


# Command line


def test_the_command_lists_runs_and_reports(
    finished: tuple[Path, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = finished
    assert main(["bench", "quality", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*METHODS, "confound", "arXiv 2507.16795"))
    assert main(["bench", "quality", "--report", str(output)]) == 0
    assert str(output / "report.md") in capsys.readouterr().out
    assert main(["bench", "quality"]) == 2
    assert "give --output" in capsys.readouterr().err


def test_the_command_runs_a_plan(tmp_path: Path) -> None:
    command = "bench quality --size tiny --dishes benign --methods naive --seeds 0"
    assert main([*command.split(), "--output", str(tmp_path / "out")]) == 0
    assert {r["method"] for r in read_rows(tmp_path / "out" / "rows.jsonl")} == {"base", "naive"}


def test_timing_is_still_what_bench_does_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    assert "providers" in capsys.readouterr().out


def test_a_plan_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size is 'nope': choose one of"):
        Plan(dishes=("persona",), size="nope")
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(ValueError, match=r"has a report\.md but no rows\.jsonl"):
        run_plan(Plan(dishes=("persona",)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
