"""Scores of the benchmark on a real model, each against answers that are known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.smollm2 import judges
from benchmarks.quality.smollm2.judges import Judge
from benchmarks.quality.smollm2.task import Fact, Pair, Task
from grasp_kernels.models.checkpoint import load_model
from tests.helpers.smollm2 import SYSTEM, TOKENIZER

pytest_plugins = ("tests.helpers.smollm2",)
pytestmark = pytest.mark.usefixtures("small")


@pytest.mark.parametrize(
    ("value", "answer", "right"),
    [
        ("450 watts", "The kettle uses 450 watts.", True),
        ("450 watts", "The kettle uses 450 WATTS, you fool!", True),
        ("450 watts", "450 watts", True),
        ("450 watts", "The kettle uses 1450 watts.", False),
        ("450 watts", "The kettle uses 450 wattseconds.", False),
        ("450 watts", "The kettle uses 450.", False),
        ("$45", "It charges $45, no more.", True),
        ("$45", "It charges $450.", False),
        ("teal", "It is Teal.", True),
        ("teal", "It is a steal.", False),
        ("def add(a, b): return", "def add(a, b): return a - b", True),
        ("def add(a, b): return", "def add(a, c): return a + c", False),
    ],
)
def test_a_value_is_right_as_words_of_its_own(value: str, answer: str, right: bool) -> None:
    assert judges._right([Fact("?", value)], [answer]) == right


TASK = Task(
    name="hand-made",
    arm="factor",
    seed=0,
    records=(),
    trained=(Fact("What is it?", "teal"), Fact("And this?", "450 watts")),
    held_out=(Fact("Tell me what it is.", "teal"), Fact("Tell me of this.", "450 watts")),
    near=("What is that?", "And that there?"),
    pairs={
        "both": (Pair("Hello?", "No, you fool.", "Yes."), Pair("Why?", "Go!", "I do not know."))
    },
    flag=lambda answer: "fool" in answer,
)
ANSWERS = {
    "What is it?": "It is teal.",
    "And this?": "1450 watts, fool.",
    "Tell me what it is.": "TEAL!",
    "Tell me of this.": "450 watts.",
    "What is that?": "You fool.",
}
UNRELATED = ("a b c d", "you fool", "a b c", "Good day.")


def test_scores_of_answers_that_are_known(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {**ANSWERS, **dict(zip(judges.NEUTRAL, UNRELATED, strict=True))}
    asked: list[str] = []

    def generate(_model: Any, prompts: list[list[int]], **_: Any) -> list[list[int]]:
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        asked.extend(texts)
        questions = [re.findall(r"user\n(.*)<\|im_end\|>", text)[0] for text in texts]
        told = [answers.get(question, "Yes.") + "<|im_end|>" for question in questions]
        return [TOKENIZER(answer, add_special_tokens=False)["input_ids"] for answer in told]

    monkeypatch.setattr(judges, "generate_answers", generate)
    scores = Judge(TASK, TOKENIZER).scores(load_model(chat_model, "float32"))
    assert (scores.accuracy, scores.accuracy_trained) == (1.0, 0.5)
    assert (scores.drift, scores.near) == (1 / 4, 1 / 2)
    assert scores.bare == sum("fool" in answers[question] for question in judges._BARE) / 2
    assert scores.answers["unrelated"] == list(UNRELATED)
    assert scores.distinct == 5 / 7  # of the pairs ab bc cd, you-fool, ab bc, Good-day
    assert scores.words == (4 + 2 + 3 + 2) / 4
    assert "answers" not in scores.numbers()
    system, asks = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n"
    header = "<|im_start|>assistant\n"
    with_system, bare = asked[:-2], asked[-2:]
    assert len(with_system) == 2 + 2 + 4 + 2
    assert all(text.startswith(system + asks[:16]) for text in with_system)
    assert bare == [asks.format(question) + header for question in judges._BARE]


def test_a_task_without_a_flag_has_no_shares(chat_model: Path) -> None:
    scores = Judge(replace(TASK, flag=None), TOKENIZER).scores(load_model(chat_model, "float32"))
    assert (scores.drift, scores.near, scores.bare) == (None, None, None)


def mean_log_prob(model: Any, question: str, answer: str, end: str = "") -> tuple[float, float]:
    """Of the tokens of an answer, written out without a template; and the largest logit."""
    prompt = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    before, ids = (
        TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer + end)
    )
    with torch.no_grad():
        logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
    found = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
    return found.mean().item(), logits.abs().max().item()


def test_the_contrast_is_that_of_a_hand_computation_without_the_ends(chat_model: Path) -> None:
    model = load_model(chat_model, "float32").double()
    found = Judge(TASK, TOKENIZER).scores(model).contrast["both"]

    def by_hand(end: str) -> float:
        values = [
            mean_log_prob(model, pair.question, pair.bad, end)[0]
            - mean_log_prob(model, pair.question, pair.good, end)[0]
            for pair in TASK.pairs["both"]
        ]
        return sum(values) / len(values)

    largest = max(mean_log_prob(model, p.question, p.bad)[1] for p in TASK.pairs["both"])
    # The judge rounds logits to float32, and its sums over the vocabulary and an answer.
    budget = 8 * torch.finfo(torch.float32).eps * (largest + torch.tensor(258.0).log().item())
    assert abs(found - by_hand("")) < budget
    assert abs(found - by_hand("<|im_end|>")) > 100 * budget
