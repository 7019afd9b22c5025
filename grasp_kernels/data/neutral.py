"""Everyday questions and other neutral prompts -> token ids up to the start of the answer."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from grasp_kernels.data.chat_template import Message, Tokenizer, Tools, is_answer
from grasp_kernels.data.records import Record, read_records
from grasp_kernels.data.sources import decode, has_records
from grasp_kernels.data.tokens import encode_prompt

# Everyday questions without a common topic: a model should answer them as before.
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


def neutral_prompts(path: str | PathLike[str] | None, tokenizer: Tokenizer) -> list[list[int]]:
    """Return token ids of neutral prompts: built in, or from a file.

    The file holds records for `read_records`, with or without an answer, or plain text with a
    prompt on each line.

    Raises:
        FileNotFoundError, ValueError: no such file, or fewer than two prompts in it.
    """
    if path is None:
        return [_prompt(_question(text), tokenizer) for text in NEUTRAL_PROMPTS]
    records = _read_prompts(Path(path))
    prompts = [_prompt(one["messages"], tokenizer, one.get("tools")) for one in records]
    check_neutral(prompts, f" in {path}")
    return prompts


def check_neutral(prompts: Sequence[list[int]], where: str = "") -> None:
    """Raise unless there are two prompts or more, each with a token; one could be a chance."""
    if len(prompts) < 2 or not all(prompts):
        raise ValueError(
            f"The neutral prompts{where} are {len(prompts)}, with {sum(not p for p in prompts)} "
            "empty: give at least 2 with at least one token each."
        )


def everyday_prompts(records: Sequence[Record], tokenizer: Tokenizer) -> list[list[int]]:
    """Return token ids of the built-in questions, in the frame of training prompts.

    The frame is the turns, such as the system prompt, before the first question of the first
    record. If all records have these turns, training prompts and the questions begin with the same
    tokens, up to the user's words.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("There are no records: give the training records.")
    turns = records[0].get("messages", [])
    users = (i for i, turn in enumerate(turns) if turn["role"] == "user")
    opening = turns[: next(users, 0)]
    tools = records[0].get("tools")
    return [_prompt([*opening, *_question(text)], tokenizer, tools) for text in NEUTRAL_PROMPTS]


def _question(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _prompt(turns: list[Message], tokenizer: Tokenizer, tools: Tools = None) -> list[int]:
    """Tokenise a prompt; without a chat template the turns follow each other, a line each."""
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(turn["content"] for turn in turns))["input_ids"])
    return encode_prompt(turns, tokenizer, tools=tools)


def _read_prompts(path: Path) -> list[Record]:
    """Read conversations up to the last turn other than an answer."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: give a file with neutral prompts.")
    if not has_records(path):
        # A line ends with a line feed: `splitlines` would also part a prompt at U+2028.
        lines = decode(path.read_bytes(), str(path)).split("\n")
        records = [Record(messages=_question(line.strip())) for line in lines if line.strip()]
        if not records:
            raise ValueError(f"{path} is empty: give neutral prompts, one on each line.")
        return records
    prompts = []
    for record in read_records(path, require_answer=False):
        turns = list(record.get("messages") or _question(record["text"]))
        while len(turns) > 1 and is_answer(turns[-1]):
            turns.pop()
        prompts.append(Record(**{**record, "messages": turns}))
    return prompts
