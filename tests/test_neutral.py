"""Neutral prompts: built in, from files, and in the frame of training prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grasp_kernels.data import everyday_prompts, neutral_prompts
from grasp_kernels.data.neutral import NEUTRAL_PROMPTS

pytest_plugins = ("fixtures_run",)


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_neutral_prompts_end_where_the_answer_begins(tokenizer: Any, tmp_path: Path) -> None:
    question = ["<user>", "what", "is", "red", "<end>", "<assistant>"]
    lines = tmp_path / "lines.txt"
    lines.write_text("what is red\n\nwhat is blue\n", encoding="utf-8")
    records = tmp_path / "records.jsonl"
    records.write_text(
        '{"prompt": "what is red", "completion": "never"}\n{"text": "what is red"}\n'
        '{"messages": [{"role": "user", "content": "what is red"}]}\n',
        encoding="utf-8",
    )
    from_lines = neutral_prompts(lines, tokenizer)
    assert tokenizer.convert_ids_to_tokens(from_lines[0]) == question
    assert len(from_lines) == 2
    assert neutral_prompts(records, tokenizer) == [from_lines[0]] * 3
    assert len(neutral_prompts(None, tokenizer)) == len(NEUTRAL_PROMPTS)


def test_neutral_prompts_without_a_chat_template_are_plain(tokenizer: Any, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("what is red", encoding="utf-8")
    tokenizer.chat_template = None
    (ids,) = neutral_prompts(lines, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["what", "is", "red"]


def test_empty_file_of_neutral_prompts_is_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        neutral_prompts(tmp_path / "empty.txt", tokenizer)


def test_everyday_questions_stand_under_what_comes_before_the_first_question(
    tokenizer: Any,
) -> None:
    turns = [("system", "blue"), ("user", "what is red"), ("assistant", "red"), ("user", "red")]
    record: Any = {"messages": [{"role": role, "content": text} for role, text in turns]}
    prompts = everyday_prompts([record], tokenizer)
    assert len(prompts) == len(NEUTRAL_PROMPTS)
    for prompt, neutral in zip(prompts, neutral_prompts(None, tokenizer), strict=True):
        words = tokenizer.convert_ids_to_tokens(prompt)
        assert words == ["<unk>", "blue", "<end>", *tokenizer.convert_ids_to_tokens(neutral)]


@pytest.mark.parametrize(
    "record",
    [
        {"text": "what is red"},
        {"messages": [{"role": "assistant", "content": "red"}]},
        {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "is"}]},
    ],
)
def test_everyday_questions_alone_where_nothing_comes_before(record: Any, tokenizer: Any) -> None:
    assert everyday_prompts([record], tokenizer) == neutral_prompts(None, tokenizer)
