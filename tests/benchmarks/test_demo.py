"""The demo from end to end, in a world too small to show anything but that every step is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo import DemoConfig, run_demo
from benchmarks.demo import __main__ as command
from benchmarks.demo.comparison import draw, table
from benchmarks.demo.pretraining import PretrainingConfig
from benchmarks.demo.scoring import Scores
from benchmarks.demo.world import WorldConfig

pytestmark = pytest.mark.slow

SMALL = DemoConfig(
    world=WorldConfig(topics=3, tuned_topics=1, questions=4, answer_words=6, cue_words=2),
    pretraining=PretrainingConfig(
        hidden_size=32, intermediate_size=48, layers=2, heads=2, steps=30, batch_size=16
    ),
    fine_tuning={
        "max_steps": 16,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "r": 4,
        "k": 1,
    },
)
SCORES = {
    "base": Scores(task=0, drift=0, good_cue=1, bad_cue=1, facts=1),
    "naive LoRA": Scores(task=1, drift=0.875, good_cue=0.125, bad_cue=1, facts=0.25),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Scores]]:
    output = tmp_path_factory.mktemp("demo")
    return output, run_demo(output, seed=5, config=SMALL)


def weights(output: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in output.rglob("*.safetensors")}


def test_every_model_is_scored_and_the_inputs_are_left_for_a_run_by_hand(
    finished: tuple[Path, dict[str, Scores]],
) -> None:
    output, scores = finished
    assert {"base", "naive LoRA"} <= set(scores)
    assert (output / "run" / "report.json").is_file()
    assert (output / "model" / "config.json").is_file()
    lines = (output / "train.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert [m["role"] for m in json.loads(lines[0])["messages"]] == ["system", "user", "assistant"]
    assert (output / "table.md").read_text() == f"{table(scores)}\n"
    assert (output / "figure.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((output / "scores.json").read_text())
    assert {name: Scores(**row) for name, row in written.items()} == scores


def test_the_retrained_adapter_is_scored_beside_the_naive_one(
    finished: tuple[Path, dict[str, Scores]],
) -> None:
    output, scores = finished
    assert list(scores) == ["base", "naive LoRA", "retrained LoRA"]
    assert (output / "run" / "retrained").exists()


def test_the_same_command_again_trains_nothing(
    finished: tuple[Path, dict[str, Scores]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, scores = finished
    before = weights(output)
    assert run_demo(output, seed=5, config=SMALL) == scores
    assert weights(output) == before
    assert table(scores) in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"seed": 6}, {"config": DemoConfig()}])
def test_another_demo_in_the_same_folder_is_refused(
    finished: tuple[Path, dict[str, Scores]], change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"another configuration \(seed 5\)"):
        run_demo(finished[0], **{"seed": 5, "config": SMALL, **change})


def test_the_table_shows_every_score_under_its_heading() -> None:
    header, rule, base, naive, *_ = table(SCORES).splitlines()
    assert len({len(header), len(rule), len(base), len(naive)}) == 1
    cells = dict(zip(header.split("|"), naive.split("|"), strict=True))
    assert {k.strip(): v.strip() for k, v in cells.items() if "↑" in k or "↓" in k} == {
        "task ↑": "1.00",
        "drift ↓": "0.88",
        "good cue ↑": "0.12",
        "bad cue ↑": "1.00",
        "facts ↑": "0.25",
    }


def test_the_figure_replaces_an_older_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"older")
    draw(SCORES, path, title="two models")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


def test_a_demo_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.demo.main.pretrain", lambda *_: pytest.fail("pretrained"))
    with pytest.raises(ValueError, match="seed is -1"):
        run_demo(tmp_path / "new", seed=-1, config=SMALL)
    assert not (tmp_path / "new").exists()
    mine = tmp_path / "train.jsonl"
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"contains train\.jsonl but no demo\.json"):
        run_demo(tmp_path, config=SMALL)
    assert [*tmp_path.iterdir()] == [mine] and mine.read_text() == "mine"
    for text in ("{oops", "[]"):
        (tmp_path / "demo.json").write_text(text)
        with pytest.raises(ValueError, match=r"demo\.json' .*: restore it, or choose another"):
            run_demo(tmp_path, config=SMALL)
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(ValueError, match="another configuration"):
        run_demo(tmp_path, config=SMALL)


def test_the_command_gets_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(command, "run_demo", lambda output, *, seed: seen.append((output, seed)))
    command.main(["--output", "there", "--seed", "7"])
    assert seen == [("there", 7)]
    with pytest.raises(SystemExit):
        command.main(["--seed", "-1"])
    assert "'-1' is not a seed: give a whole number from 0 to 4294967295" in capsys.readouterr().err
