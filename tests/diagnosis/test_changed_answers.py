"""The adapter's own answers: what they say, how likely both models find them, and the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from grasp_kernels.diagnosis import Changed, Pair, changed_answers, own_answers, told, verdict
from grasp_kernels.diagnosis.answers import CHANGED
from tests.helpers.models import randomise_adapter, tiny_peft_model

pytest_plugins = ("tests.helpers.runs",)
PROMPTS = [[1, 5, 6, 3], [1, 7, 3], [1, 8, 9, 10, 3], [1, 11, 3]]


class NoEnd:
    """A tokenizer without an end token, so that answers have their whole length."""

    eos_token_id = None


@pytest.fixture
def pair() -> Pair:
    model = tiny_peft_model().eval()
    model.get_base_model().generation_config.eos_token_id = None
    return Pair(model)


@torch.no_grad()
def found(pair: Pair, batch_size: int = 3) -> list[Changed]:
    tokenizer: Any = NoEnd()
    base = own_answers(pair, tokenizer, PROMPTS, n_tokens=5, batch_size=batch_size)
    return changed_answers(pair, tokenizer, base, n_tokens=5, batch_size=batch_size)


def test_answers_are_the_adapter_s_own_with_both_likelihoods(pair: Pair) -> None:
    answers = found(pair)
    assert [one.prompt for one in answers] == PROMPTS
    for one in answers:
        ids = torch.tensor([one.prompt + one.adapter])
        start = len(one.prompt)
        with torch.no_grad():
            on = pair.model(input_ids=ids).logits.double().log_softmax(-1)[0, start - 1 : -1]
            with pair.model.disable_adapter():
                off = pair.model(input_ids=ids).logits.double().log_softmax(-1)[0, start - 1 : -1]
        assert on.argmax(-1).tolist() == one.adapter  # greedy
        target = torch.tensor(one.adapter)[:, None]
        both = [logs.gather(1, target)[:, 0] for logs in (on, off)]
        assert one.ratio == pytest.approx((both[0] - both[1]).sum().item(), rel=1e-4)
        assert one.unlikely == (both[1].exp() < 0.01).tolist()
    assert any(one.adapter != one.base for one in answers)


def test_an_adapter_that_does_nothing_changes_nothing(pair: Pair) -> None:
    with torch.no_grad():
        for name, parameter in pair.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    for one in found(pair):
        assert one.adapter == one.base
        assert one.ratio == pytest.approx(0.0, abs=1e-5)
    assert verdict(found(pair)) == "nothing"


def test_a_strong_adapter_is_found_and_the_batch_does_not_matter(pair: Pair) -> None:
    randomise_adapter(pair.model)
    with torch.no_grad():
        for name, parameter in pair.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(8)
    answers = found(pair)
    assert verdict(answers) == "found"
    for one, other in zip(answers, found(pair, batch_size=1), strict=True):
        assert (one.prompt, one.adapter) == (other.prompt, other.adapter)
        assert one.ratio == pytest.approx(other.ratio, rel=1e-4)


def answer(ratio: float) -> Changed:
    return Changed([1], [2], [2], ratio, [False])


@pytest.mark.parametrize(
    ("changed", "of", "expected"),
    [
        (0, 16, "nothing"),
        (1, 16, "weak"),
        (2, 16, "found"),  # never nothing or weak where 2 of 16 answers show a factor
        (1, 4, "weak"),  # one answer is no evidence
        (2, 4, "found"),
        (7, 64, "weak"),
        (8, 64, "found"),
    ],
)
def test_the_verdict_counts_changed_answers(changed: int, of: int, expected: str) -> None:
    answers = [answer(CHANGED)] * changed + [answer(CHANGED - 0.01)] * (of - changed)
    assert verdict(answers) == expected


def test_what_is_told_is_text_without_the_frame(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer.convert_tokens_to_ids
    asked = [[*ids(["<user>", w, "<end>", "<assistant>"])] for w in ("red", "blue")]
    one = Changed(asked[0], ids(["good"]), ids(["never", "good", "no"]), 9.0, [True, True, False])
    other = Changed([*ids(["what", "is"])], ids(["good"]), ids(["good"]), 0.0, [False])
    assert told([one, other], tokenizer, asked) == [
        {
            "prompt": "red",
            "base": "good",
            "adapter": [["never good", True], ["no", False]],
            "ratio": 9.0,
            "changed": True,
        },
        {
            "prompt": "what is",
            "base": "good",
            "adapter": [["good", False]],
            "ratio": 0.0,
            "changed": False,
        },
    ]
