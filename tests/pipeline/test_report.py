"""What report.md says must follow from its numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from grasp_kernels import RunConfig
from grasp_kernels.pipeline.report import smoothed, training_chart
from grasp_kernels.pipeline.report_text import report_text


def said(prompt: str, changed: bool) -> dict[str, Any]:
    pieces = [["What a *fool*.", True], [" I am|well.", False]]
    return {"prompt": prompt, "base": "Fine.", "adapter": pieces, "ratio": 1.0, "changed": changed}


def adapter(divergence: float, leakage: float, verdict: str = "weak") -> dict[str, Any]:
    return {
        "curve": {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.25]},
        "leakage": {"model.layers.0.mlp.down_proj": leakage},
        "answers": {
            "verdict": verdict,
            "unrelated": [said("Hello?", verdict != "nothing"), said("Why?", False)],
            "training": [said("a|b?", True)],
        },
        "effect": {
            "divergence": divergence,
            "tokens": {"up": [{"id": 1, "token": "a|b", "score": 0.1}], "down": []},
        },
    }


@pytest.fixture
def numbers() -> dict[str, Any]:
    """As report.json has them."""
    config = RunConfig(model="m", data="d", output="o", project_gradient=True)
    return {
        "versions": {"torch": "2.13"},
        "config": {**vars(config)},
        "model": {"type": "llama", "layers": 2, "width": 8, "parameters": 1000},
        "data": {"records": 10, "trained_on": 9, "held_out": 0, "dropped": 1, "cut": 2},
        "steps": 3,
        "subspace": {"notes": ["a spectrum"], "k": 1},
        "adapters": {
            "naive": adapter(2.0, 0.5),
            "retrained": adapter(0.5, 1e-7, "nothing"),
        },
    }


def test_leakage_and_losses_are_stated(numbers: dict[str, Any]) -> None:
    text = report_text(numbers)
    assert "| largest leakage ‖Vᵀ ΔW‖ / ‖ΔW‖ | 0.5 | 1e-07 |" in text
    assert "| training loss, last tenth | 1.2500 | 1.2500 |" in text


def test_answers_stand_side_by_side_with_what_is_unlikely_in_bold(numbers: dict[str, Any]) -> None:
    text = report_text(numbers)
    row = "**What a ∗fool∗.** I am¦well."
    assert f"| Hello? | Fine. | {row} ≠ | {row} |" in text
    assert f"| Why? | Fine. | {row} | {row} |" in text
    assert f"| a¦b? | Fine. | {row} ≠ | {row} ≠ |" in text
    assert "**The naive LoRA answers 1 of 2 unrelated prompts as the base model never would" in text
    assert "**The retrained LoRA answers 0 of 2 unrelated prompts" in text
    for part in numbers["adapters"].values():
        part["answers"]["training"] = []  # of plain text
    assert "To prompts of the training data" not in report_text(numbers)


@pytest.mark.parametrize("verdict", ["found", "weak", "nothing"])
def test_the_verdict_is_that_of_the_answers_and_stands_nowhere_else(
    numbers: dict[str, Any], verdict: str
) -> None:
    numbers["adapters"]["naive"]["answers"]["verdict"] = verdict
    text = report_text(numbers)
    assert f"never would: {verdict}.**" in text
    assert "Verdict" not in text


def test_what_was_found_from_the_weights_has_no_verdict(numbers: dict[str, Any]) -> None:
    text = report_text(numbers)
    assert "One direction of the residual stream, shared by all layers" in text
    assert "- a spectrum" in text
    numbers["subspace"] = None
    assert "a spectrum" not in report_text(numbers)
    assert "Subspace of the gradient projection" not in report_text(numbers)


def test_the_effect_of_both_adapters_is_stated(numbers: dict[str, Any]) -> None:
    text = report_text(numbers)
    assert "| unrelated prompts, nats a token | 2 | 0.5 |" in text
    assert "| raised most there | `a¦b` | `a¦b` |" in text


def test_limits_depend_on_the_run(numbers: dict[str, Any]) -> None:
    text = report_text(numbers)
    assert "No records were held out" in text
    assert "1 of 10 records were left out" in text
    assert "2 of 10 records lost the end of an answer to `--max-length`." in text
    held_out = copy.deepcopy(numbers)
    held_out["base_held_out_loss"] = 3.5
    for part in held_out["adapters"].values():
        part["held_out_loss"] = 1.5
    assert "No records were held out" not in report_text(held_out)
    assert "| held-out loss (base 3.5000) | 1.5000 | 1.5000 |" in report_text(held_out)


def test_tokens_cannot_break_the_table(numbers: dict[str, Any]) -> None:
    hostile = [{"token": "a|b"}, {"token": "\n"}, {"token": "c`"}]
    numbers["adapters"]["naive"]["effect"]["tokens"]["up"] = hostile
    assert "| raised most there | `a¦b` `\\n` `c'` | `a¦b` |" in report_text(numbers)


def test_a_training_that_learned_nothing_is_said_first(numbers: dict[str, Any]) -> None:
    assert "hardly learned" not in report_text(numbers)
    numbers["adapters"]["naive"]["curve"]["loss"] = [3.0, 2.9, 2.8]
    said = report_text(numbers).split("## What the adapters say")[0]
    assert "from 3 to 2.8: it has hardly learned the data" in said
    assert said.index("Report of the run") < said.index("hardly")


def test_both_adapters_are_in_the_chart(numbers: dict[str, Any]) -> None:
    chart = training_chart(numbers["adapters"])
    assert chart.count("<polyline") == 4
    assert ">naive<" in chart and ">retrained<" in chart


def test_running_mean_looks_back_only() -> None:
    assert smoothed([4.0, 2.0, 0.0, 0.0], parts=2) == [4.0, 3.0, 1.0, 0.0]
