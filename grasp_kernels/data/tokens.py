"""Records -> token ids with labels on the answers alone.

Shapes: `B` records of a batch, `T` tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from grasp_kernels.data.chat_template import Message, Span, answer_spans, render
from grasp_kernels.data.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of tokens that take no part in the loss (torch's cross_entropy default)


class Example(TypedDict):
    """What a causal language model trains on; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]


def encode(
    record: Record, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> Example | None:
    """Tokenise a record; labels are `IGNORED` (-100) except on its answers.

    Every assistant turn counts, with the token that ends it; plain text counts whole. The rendering
    is tokenised once and the answers are found by character offsets, so the tokens at their borders
    are those of the full text; a token with at least one character of an answer belongs to it.

    Returns:
        The example, cut at `max_length` tokens, or None where nothing to learn is left of it.

    Raises:
        ValueError: no chat template, a template that rewrites earlier turns, a slow tokenizer.
    """
    if "text" in record:
        ids = _encode_plain("", record["text"], tokenizer)["input_ids"]
        example = Example(input_ids=ids, labels=list(ids))
    elif tokenizer.chat_template is None and record.get("concatenate"):
        prompt, answer = (message["content"] for message in record["messages"])
        example = _encode_plain(prompt, answer, tokenizer)
    else:
        example = _encode_chat(record, tokenizer)
    example = Example(
        input_ids=example["input_ids"][:max_length], labels=example["labels"][:max_length]
    )
    # The first token is never predicted, so its label teaches nothing.
    return example if any(label != IGNORED for label in example["labels"][1:]) else None


def encode_prompt(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise a conversation and the header of the answer that should come next."""
    text = render(messages, tokenizer, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def split_first_answer(
    record: Record, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids before the first trained answer, and those of that answer with its end token.

    Raises:
        ValueError: plain text, which has no prompt, or as `encode`.
    """
    if "text" in record:
        raise ValueError(
            "A plain text has no prompt that could be answered differently: "
            'give chat data ("messages", "prompt" and "completion", ...).'
        )
    example = encode(record, tokenizer, max_length=None)
    counted = [label != IGNORED for label in example["labels"]] if example else [True]
    start = counted.index(True)
    if example is None or start == 0:
        raise ValueError(
            "The record has no answer, or no token before it: give chat data with a question and "
            "an answer, and check tokenizer.chat_template."
        )
    end = counted.index(False, start) if False in counted[start:] else len(counted)
    return example["input_ids"][:start], example["input_ids"][start:end]


def tokenize_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    progress: bool = False,
) -> tuple[list[Example], int]:
    """Encode all records.

    Returns:
        (examples, n_dropped): a plain list, which `transformers.Trainer` takes as a dataset, and
        the number of records left out because `max_length` cuts their whole answer away.

    Raises:
        ValueError: a record by its number (from 1), or no example is left.
    """
    from tqdm.auto import tqdm

    examples = []
    for number, record in enumerate(
        tqdm(records, desc="tokenize", unit="record", disable=not progress), start=1
    ):
        try:
            example = encode(record, tokenizer, max_length=max_length)
        except ValueError as error:
            raise ValueError(f"Record {number}: {error}") from None
        if example is not None:
            examples.append(example)
    if not examples:
        raise ValueError(
            f"None of the {len(records)} records has an answer token within max_length="
            f"{max_length}: raise max_length."
        )
    return examples, len(records) - len(examples)


def collate(batch: Iterable[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right: `input_ids`, `labels`, `attention_mask`, each int64 `[B, T]`."""

    def pad(rows: Iterable[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    batch = list(batch)
    return {
        "input_ids": pad((example["input_ids"] for example in batch), pad_token_id),
        "labels": pad((example["labels"] for example in batch), IGNORED),
        "attention_mask": pad(([1] * len(example["input_ids"]) for example in batch), 0),
    }


def _encode_chat(record: Record, tokenizer: PreTrainedTokenizerBase) -> Example:
    text, spans = answer_spans(record["messages"], tokenizer, context=record.get("context", 0))
    ids, labels = _tokens_with_labels(text, spans, tokenizer, add_special_tokens=False)
    return Example(input_ids=ids, labels=labels)


def _encode_plain(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Prompt and answer as they stand, begun and ended by the special tokens, once."""
    text, bos, eos = prompt + answer, tokenizer.bos_token, tokenizer.eos_token
    begun = bos is not None and text.startswith(bos)
    span = (len(prompt), len(text))
    ids, labels = _tokens_with_labels(text, [span], tokenizer, add_special_tokens=not begun)
    if eos is not None and not text.rstrip().endswith(eos):
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
            labels.append(IGNORED)
        labels[-1] = ids[-1]
    return Example(input_ids=ids, labels=labels)


def _tokens_with_labels(
    text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which characters a token covers: "
            "use the fast tokenizer of this model (AutoTokenizer, with a tokenizer.json)."
        )
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
    labels = [IGNORED] * len(ids)
    special = special_ids(tokenizer)
    for start, end in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        for i in _until_end_of_turn(inside, ids, offsets, text, special):
            labels[i] = ids[i]
    return ids, labels


def _until_end_of_turn(
    inside: list[int], ids: list[int], offsets: list[Span], text: str, special: set[int]
) -> list[int]:
    """Leave out the white space that ChatML and Gemma put between the end token and the next turn.

    The model stops at the end token, so it never writes that white space itself.
    """
    for n in range(len(inside), 0, -1):
        i = inside[n - 1]
        if ids[i] in special:
            return inside[:n]
        if text[slice(*offsets[i])].strip():
            break
    return inside


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that stand for structure, not for text."""
    added = tokenizer.added_tokens_decoder
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def shared_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    """What all of at least one sequence begin with."""
    ordered = sorted(map(list, sequences))
    first, last = ordered[0], ordered[-1]  # these two share what all do
    ends = zip(first, last, strict=False)
    return first[: next((i for i, (a, b) in enumerate(ends) if a != b), min(len(first), len(last)))]
