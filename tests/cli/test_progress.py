"""Progress in a log: whole lines, few of them, and a plan with its time at the start."""

import re
import sys
import time
from dataclasses import replace

import pytest

from grasp_kernels import RunConfig, progress, run

pytest_plugins = ("tests.helpers.runs",)


def test_a_log_gets_lines_and_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.01)
    with progress.bar(total=5, desc="naive LoRA", unit="step") as shown:
        for _ in range(5):
            time.sleep(0.02)
            shown.set_postfix(loss="0.5", refresh=False)
            shown.update()
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert "\r" not in said
    assert 2 <= len(lines) <= 6
    assert re.fullmatch(
        r"naive LoRA: 5/5 steps, 00:00 so far, about 00:00 left, loss=0.5", lines[-1]
    )


def test_what_is_short_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.bar([1, 2], desc="tokenize", unit="record")) == [1, 2]
    with progress.bar(total=3, desc="hidden", unit="step", disable=True) as shown:
        shown.update(3)
    assert capsys.readouterr().err == ""


def test_a_sentence_is_said_beside_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(total=5, desc="naive LoRA", unit="step") as shown:
        shown.update()
        progress.tell("A step takes 1 s.")
    assert capsys.readouterr().err == "A step takes 1 s.\n"


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.bar([1, 2], desc="tokenize", unit="record")) == [1, 2]
    assert "\rtokenize: 100%" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_says_what_it_will_do(
    run_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run(replace(run_config, num_documents=8))
    said = capsys.readouterr().err
    plan, forecast = (next(line for line in said.splitlines() if start in line) for start in (
        "To do, in this order", "A step takes"
    ))  # fmt: skip
    assert plan == (
        "To do, in this order: 8 chats of the base model, the naive LoRA (12 steps), a subspace, "
        "the retrained LoRA (12 steps), the answers of both. It can be stopped at any time."
    )
    times = re.fullmatch(
        r"A step takes (\S+) s: about (\S+) min for the naive LoRA, and (\S+) min for the "
        r"retraining\.",
        forecast,
    )
    assert times is not None
    step, naive, retraining = map(float, times.groups())
    assert naive == pytest.approx(12 * step / 60, rel=0.1)
    assert naive < retraining < 4 * naive
    assert "step/s" not in said
