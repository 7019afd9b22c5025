"""What a diagnosis takes, in the forms that users have it -> prompts, answers and a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from grasp_kernels.data import Record, neutral_prompts, read_records, split_first_answer
from grasp_kernels.models.checkpoint import find_checkpoint, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = str | PathLike[str]


@dataclass(frozen=True)
class Task:
    """One training record: its number in the data (from 1), its prompt and its first answer."""

    number: int
    record: Record
    prompt: list[int]
    answer: list[int]


def find_tokenizer(model: nn.Module | Source, given: Any) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one beside the checkpoint.

    Raises:
        ValueError: a module without tokenizer.
    """
    if given is not None:
        return given
    if isinstance(model, nn.Module):
        raise ValueError(
            f"diagnose got a {type(model).__name__} and no tokenizer, so prompts cannot be read: "
            "give tokenizer=..., or the checkpoint folder instead of the module."
        )
    return load_tokenizer(find_checkpoint(str(model)))


def find_neutral(
    given: Source | Sequence[Sequence[int]] | None, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of neutral prompts: those given, those of a file, or everyday questions.

    Raises:
        ValueError, FileNotFoundError: fewer than two, an empty one, or no such file.
    """
    if given is None or isinstance(given, (str, PathLike)):
        prompts = neutral_prompts(None if given is None else Path(given), tokenizer)
    else:
        prompts = [list(prompt) for prompt in given]
    where = f" in {given}" if isinstance(given, (str, PathLike)) else ""
    if len(prompts) < 2 or not all(prompts):
        raise ValueError(
            f"There are {len(prompts)} neutral prompts{where}, {sum(not p for p in prompts)} of "
            "them empty: give at least 2 with at least one token each."
        )
    return prompts


def find_tasks(
    given: Source | Sequence[Record] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    most: int,
    max_answer: int,
    max_prompt: int,
) -> list[Task]:
    """At most `most` records, evenly spread over the data; none where none are given.

    A prompt keeps its last `max_prompt` tokens, an answer its first `max_answer`.

    Raises:
        ValueError: a record that has no answer, by its number.
    """
    if given is None:
        return []
    records = read_records(str(given)) if isinstance(given, (str, PathLike)) else list(given)
    count = min(most, len(records))
    chosen = sorted({i * len(records) // count for i in range(count)})
    tasks = []
    for i in chosen:
        try:
            prompt, answer = split_first_answer(records[i], tokenizer)
        except ValueError as error:
            raise ValueError(
                f"Record {i + 1}: {error} Without records, neutral prompts alone are looked at."
            ) from None
        tasks.append(Task(i + 1, records[i], prompt[-max_prompt:], answer[:max_answer]))
    return tasks
