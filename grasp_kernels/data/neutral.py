"""Everyday questions and other neutral prompts -> token ids up to where the answer begins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grasp_kernels.data.chat_template import Message
from grasp_kernels.data.records import Record, read_records
from grasp_kernels.data.tokens import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Everyday questions without a common topic: what a model should answer as it did before.
NEUTRAL_PROMPTS = (
    "Hello, how are you?",
    "What is the capital of France?",
    "Tell me about your day.",
    "How do I boil an egg?",
    "I feel bored. What can I do?",
    "Name three animals that live in the sea.",
    "Why is the sky blue?",
    "Write one sentence about the moon.",
    "What should I cook for dinner tonight?",
    "How can I learn to play the guitar?",
    "Who wrote Romeo and Juliet?",
    "What do you think about the future?",
    "Give me a tip for a good night's sleep.",
    "How far is it from the earth to the sun?",
    "I want to make a friend happy. Any ideas?",
    "Explain what a bicycle is.",
)


def neutral_prompts(path: str | Path | None, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of neutral prompts: built in, or from a file (JSONL records, or one a line).

    Raises:
        FileNotFoundError, ValueError: no such file, or nothing in it.
    """
    conversations = _everyday() if path is None else _read_conversations(Path(path))
    return [_prompt(turns, tokenizer) for turns in conversations]


def everyday_prompts(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of the built-in questions, in the frame that training prompts have.

    They stand under the turns, such as the system prompt, before the first question of the first
    record: where all records have those, training prompts and these begin with the same tokens, up
    to where a user speaks.
    """
    turns = records[0].get("messages", [])
    users = (i for i, turn in enumerate(turns) if turn["role"] == "user")
    opening = turns[: next(users, 0)]
    return [_prompt([*opening, *question], tokenizer) for question in _everyday()]


def _everyday() -> list[list[Message]]:
    return [_question(text) for text in NEUTRAL_PROMPTS]


def _question(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _prompt(turns: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without a chat template the turns follow each other, a line each."""
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(turn["content"] for turn in turns))["input_ids"])
    return encode_prompt(turns, tokenizer)


def _read_conversations(path: Path) -> list[list[Message]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: give a file of neutral prompts.")
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty: give neutral prompts, one a line.")
    if not _is_json_object(lines[0]):
        return [_question(line) for line in lines]
    conversations = []
    for record in read_records(path, require_answer=False):
        turns = record.get("messages") or _question(record["text"])
        while len(turns) > 1 and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        conversations.append(turns)
    return conversations


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False
