"""Rows of a trainer -> examples as it trains on them, and everyday questions in their frame.

A trainer of trl makes token ids of its rows. Where these say which tokens are learned they are
taken as they are. Otherwise the rows are read as conversations, whose answers are learned.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from grasp_kernels.data import (
    IGNORED,
    Example,
    Record,
    encode_prompt,
    everyday_prompts,
    neutral_prompts,
    parse_record,
    shared_start,
    tokenize_records,
)
from grasp_kernels.data.chat_template import is_answer

_MOST = 4096  # rows of the data that are looked at for the shape of its prompts
_MASKS = ("completion_mask", "assistant_masks")  # trl's, 1 where a token is learned
_ANSWERS = ("chosen_ids", "completion_ids")  # trl's, of preferences and of single answers
_REMEDY = "or give existing chats, kl_regularizer=KLRegularizer.make(...)"

Prompts = tuple[list[Example], list[list[int]]]


def training_prompts(rows: Any, tokenized: Any, tokenizer: Any, max_length: int) -> Prompts:
    """Read some of the data a trainer trains on.

    Args:
        rows: the data as the trainer was given them: conversations in any layout that
            `read_records` knows, prompts without an answer, or token ids.
        tokenized: the data as the trainer has them now.
        tokenizer: of the trainer; None where it has none.
        max_length: tokens at which a row is cut.

    Returns:
        Examples, and the token ids of everyday questions in the frame that all of them have.

    Raises:
        ValueError: no data, or data that are none of these.
    """
    rows = list(_some(tokenized if rows is None else rows))
    trained_on = list(_some(tokenized))
    if not rows or not trained_on:
        raise ValueError("The trainer's train_dataset is empty: give the data to train on.")
    examples = [example for row in trained_on if (example := _tokenized(row)) is not None]
    if len(examples) == len(trained_on):
        says_what_is_learned = any(IGNORED in example["labels"] for example in examples)
        if says_what_is_learned or not _are_conversations(rows):
            return _learned(examples), _in_frame(examples, tokenizer)
    if tokenizer is None:
        raise ValueError(
            "The data are not token ids, and the trainer has no tokenizer: use "
            f"GraspTrainer(processing_class=tokenizer), {_REMEDY}."
        )
    return _of_records(rows, tokenizer, max_length)


def _of_records(rows: Sequence[Any], tokenizer: Any, max_length: int) -> Prompts:
    rows = [_preferred(row) if isinstance(row, dict) else row for row in rows]
    try:
        records = [
            parse_record(row, f"Row {number}", require_answer=not _has_prompt(row))
            for number, row in enumerate(rows, start=1)
        ]
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}; {_REMEDY}.") from None
    turns = [record.get("messages") for record in records]
    if all(known and not is_answer(known[-1]) for known in turns):
        examples = [
            _until_answer(row["prompt"], record, tokenizer)
            for row, record in zip(rows, records, strict=True)
        ]
        if isinstance(rows[0]["prompt"], str):
            return examples, _in_frame(examples, tokenizer)
    else:
        examples, _ = tokenize_records(records, tokenizer, max_length)
    return _learned(examples), everyday_prompts(records, tokenizer)


def _some(rows: Any) -> Iterable[Any]:
    """Yield at most `_MOST` rows, evenly spaced; of a stream the first ones."""
    if rows is None:
        raise ValueError("The trainer has no train_dataset: give the training data.")
    drawn = rows
    if hasattr(rows, "__len__"):
        drawn = (rows[i] for i in range(0, len(rows), max(1, -(-len(rows) // _MOST))))
    return (dict(row) if isinstance(row, Mapping) else row for row in islice(drawn, _MOST))


def _tokenized(row: Any) -> Example | None:
    """Turn a row of token ids into an example; without label and mask all of it is learned."""
    if not isinstance(row, dict):
        return None
    if "input_ids" in row:
        ids = _ints(row["input_ids"])
        labels = _ints(row.get("labels", ids))
        for mask in _MASKS:
            if row.get(mask) is not None:
                learned = zip(labels, row[mask], strict=True)
                labels = [label if here else IGNORED for label, here in learned]
        return Example(input_ids=ids, labels=labels)
    for answer in _ANSWERS:
        if "prompt_ids" in row and answer in row:
            prompt, ids = _ints(row["prompt_ids"]), _ints(row[answer])
            return Example(input_ids=prompt + ids, labels=[IGNORED] * len(prompt) + ids)
    return None


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _are_conversations(rows: Sequence[Any]) -> bool:
    """Say whether all rows have turns, so that answers can be told from questions."""
    try:
        records = [parse_record(row, "") for row in rows]
    except ValueError:
        return False
    return all("messages" in record for record in records)


def _preferred(row: dict[str, Any]) -> dict[str, Any]:
    """Keep the chosen answer of a preference, and a rated answer whatever its label."""
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected", "label")}
    if "chosen" not in row:
        return rest
    return {**rest, "completion" if "prompt" in row else "messages": row["chosen"]}


def _has_prompt(row: Any) -> bool:
    return isinstance(row, dict) and "prompt" in row and "completion" not in row


def _until_answer(prompt: str | list[Any], record: Record, tokenizer: Any) -> Example:
    """Put an end token where the answer to a prompt is yet to come.

    A prompt that is a string gets no chat template, as in trl.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        ids = encode_prompt(record["messages"], tokenizer, tools=record.get("tools"))
    end = tokenizer.eos_token_id
    return Example(input_ids=[*ids, end], labels=[IGNORED] * len(ids) + [end])


def _learned(examples: list[Example]) -> list[Example]:
    """Keep the examples with a token to learn, or raise if none has."""
    learned = [one for one in examples if any(label != IGNORED for label in one["labels"])]
    if not learned:
        raise ValueError(
            f"None of {len(examples)} rows of train_dataset has a token to learn: give answers, "
            "and labels other than -100."
        )
    return learned


def _in_frame(examples: Sequence[Example], tokenizer: Any) -> list[list[int]]:
    """Return everyday questions if the training prompts open as they do, else none.

    Under a system prompt of the data the chats of the base model have it, too.
    """
    neutral = neutral_prompts(None, tokenizer) if tokenizer is not None else []
    opening = shared_start(neutral) if neutral else []
    matches = all(example["input_ids"][: len(opening)] == opening for example in examples)
    return neutral if matches else []
