"""GraspTrainerMixin before trl's trainers: what they take as data is what the chats look like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

import grasp_kernels as gk
from grasp_kernels.training.prompts import training_prompts
from tests.helpers.trainers import SHORT

pytestmark = pytest.mark.slow
Rows = list[dict[str, Any]]
LENGTH = 6  # tokens of a question and of an answer


class Sft(gk.GraspTrainerMixin, SFTTrainer):
    pass


class Dpo(gk.GraspTrainerMixin, DPOTrainer):
    pass


class Kto(gk.GraspTrainerMixin, KTOTrainer):
    pass


class Grpo(gk.GraspTrainerMixin, GRPOTrainer):
    pass


@pytest.fixture
def rows(chat_jsonl: Path) -> Rows:
    return [json.loads(line) for line in chat_jsonl.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def train(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    def trained(trainer: Any, config: Any, rows: Rows, *, more: Any = None, **settings: Any) -> Any:
        made = trainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_dir),
            args=config(
                output_dir=str(tmp_path),
                max_steps=2,
                save_strategy="no",
                bf16=False,
                gradient_checkpointing=False,
                **{**SHORT, **settings},
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            grasp_config=gk.GraspConfig(num_documents=12, max_new_tokens=LENGTH),
            **(more or {}),
        )
        made.train()
        return made

    return trained


def check_chats(made: Any, opening: str = "<user>", header: str | None = "<assistant>") -> None:
    """Every chat opens as the prompts do, and has an answer; of plain text there is no header."""
    tokenizer, found = made.processing_class, made.kl_regularizer
    begin = tokenizer(opening)["input_ids"]
    assert (found.documents[:, : len(begin)] == torch.tensor(begin)).all()
    if header is not None:
        (token,) = tokenizer(header)["input_ids"]
        at = (found.documents == token).int().argmax(dim=1)
        assert (at > 0).all()
        first = found.counted.int().argmax(dim=1)
        assert (first[found.counted.any(dim=1)] >= at[found.counted.any(dim=1)]).all()
    kl = [entry["kl"] for entry in made.state.log_history if "loss" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6)  # at the base model, up to float32's rounding
    assert kl[1] > 1e-5


def test_preferences(train: Callable[..., Any], rows: Rows) -> None:
    pairs = [
        {"prompt": turns[:1], "chosen": turns[1:], "rejected": [{**turns[1], "content": "six"}]}
        for turns in (row["messages"] for row in rows)
    ]
    check_chats(train(Dpo, DPOConfig, pairs))


def test_answers_with_a_label(train: Callable[..., Any], rows: Rows) -> None:
    labelled = [
        {"prompt": turns[:1], "completion": turns[1:], "label": bool(i % 2)}
        for i, turns in enumerate(row["messages"] for row in rows)
    ]
    check_chats(train(Kto, KTOConfig, labelled))


@pytest.mark.parametrize("is_chat", [True, False])
def test_prompts_that_the_model_answers(
    train: Callable[..., Any], rows: Rows, is_chat: bool
) -> None:
    """Around a prompt that is a string trl puts no template, and the chats have none either."""
    turns = [row["messages"][:1] for row in rows]
    prompts = [{"prompt": turn if is_chat else turn[0]["content"]} for turn in turns]
    made = train(
        Grpo,
        GRPOConfig,
        prompts,
        more={"reward_funcs": lambda completions, **_: [float(i) for i in range(len(completions))]},
        num_generations=2,
        max_completion_length=4,
    )
    if is_chat:
        check_chats(made)
    else:
        check_chats(made, opening="what is", header=None)


def test_a_formatting_function(train: Callable[..., Any], rows: Rows) -> None:
    odd = [{"q": r["messages"][0]["content"], "a": r["messages"][1]["content"]} for r in rows]
    more = {"formatting_func": lambda row: f"{row['q']} yes {row['a']} no"}
    check_chats(train(Sft, SFTConfig, odd, more=more), opening="what", header=None)


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_masks_of_token_ids_say_what_is_learned(
    train: Callable[..., Any], tiny_model_dir: Path, rows: Rows, mask: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenized = []
    for row in rows:
        whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        start = whole.index(tokenizer("<assistant>")["input_ids"][0]) + 1
        tokenized.append({"input_ids": whole, mask: [0] * start + [1] * (len(whole) - start)})
    check_chats(train(Sft, SFTConfig, tokenized))


def test_strings_stand_without_a_template_as_trl_trains_on_them(
    train: Callable[..., Any], rows: Rows
) -> None:
    pairs = [
        {"prompt": f"{q['content']} yes", "completion": f" {a['content']}"}
        for q, a in (row["messages"] for row in rows)
    ]
    made = train(Sft, SFTConfig, pairs)
    user = made.processing_class("<user>")["input_ids"][0]
    check_chats(made, opening="what is", header="yes")
    assert not (made.kl_regularizer.documents[:, 0] == user).any()


def test_layers_that_changed_after_the_constructor_are_ours_again(
    train: Callable[..., Any], rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Sft.train

    def removed_before(self: Sft, *args: Any, **options: Any) -> Any:
        gk.remove_grasp(self.model)
        assert not any(isinstance(m, gk.GraspLoRALinear) for m in self.model.modules())
        return begin(self, *args, **options)

    monkeypatch.setattr(Sft, "train", removed_before)
    made = train(Sft, SFTConfig, rows)
    assert sum(isinstance(m, gk.GraspLoRALinear) for m in made.model.modules()) == 3 * 7
    check_chats(made)


@pytest.mark.parametrize("layout", ["preference", "without prompt", "label"])
def test_rows_that_no_trainer_has_made_token_ids_of(
    tiny_model_dir: Path, rows: Rows, layout: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    as_given = [
        {
            "preference": {"prompt": turns[:1], "chosen": turns[1:], "rejected": turns[1:]},
            "without prompt": {"chosen": turns, "rejected": turns[:1]},
            "label": {"prompt": turns[:1], "completion": turns[1:], "label": False},
        }[layout]
        for turns in (row["messages"] for row in rows)
    ]
    found = training_prompts(as_given, as_given, tokenizer, 64)
    assert found == training_prompts(rows, rows, tokenizer, 64)
    assert len(found[0]) == len(rows)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}, r"None of 4 rows .* to learn"),
        ({"input_ids": [], "labels": []}, r"None of 4 rows .* to learn"),
        ({"prompt": [], "chosen": []}, r"Row 1: .*kl_regularizer=KLRegularizer.make"),
        ({"review": "three"}, r"Row 1: unknown keys \['review'\].*kl_regularizer="),
    ],
)
def test_data_that_teach_nothing_are_named(
    tiny_model_dir: Path, row: dict[str, Any], problem: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match=problem):
        training_prompts([row] * 4, [row] * 4, tokenizer, 64)
