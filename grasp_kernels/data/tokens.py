"""Records -> token ids with labels on the answers alone.

Shapes: `B` records of a batch, `T` tokens of the longest of them.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from grasp_kernels.data.chat_template import (
    Message,
    Span,
    Tokenizer,
    Tools,
    render_answers,
    render_prompt,
    shared_length,
)
from grasp_kernels.data.records import Record, parse_record
from grasp_kernels.progress import bar

IGNORED = -100  # label of tokens outside of the loss (torch's cross_entropy default)


class Example(TypedDict):
    """Hold one training sequence; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]


def encode(record: Record, tokenizer: Tokenizer, *, max_length: int | None) -> list[Example]:
    """Tokenise a record, or a row in its layouts; labels are `IGNORED` but for its answers.

    Every assistant turn without a mark as given counts, with its end token; plain text counts
    whole. The rendering is tokenised once and the answers are found by character offsets, so the
    tokens at the borders of an answer are those of the full text. A token with at least one
    character of an answer belongs to the answer.

    Returns:
        One example, or one for each answer where the chat template writes earlier turns
        differently or ends no answer itself (the end token of the tokenizer then does); each cut at
        `max_length` tokens, and left out where nothing to learn is left of it.

    Raises:
        ValueError: no record, no chat template, a template that omits words of a turn, a slow
            tokenizer.
    """
    record = _checked(record)
    if "text" in record:
        ids = _encode_plain("", record["text"], tokenizer)["input_ids"]
        examples = [Example(input_ids=ids, labels=list(ids))]
    elif tokenizer.chat_template is None and record.get("concatenate"):
        prompt, answer = (message["content"] for message in record["messages"])
        examples = [_encode_plain(prompt, answer, tokenizer)]
    else:
        examples = _encode_chat(record, tokenizer)
    return _cut(examples, max_length)


def _cut(examples: Iterable[Example], max_length: int | None) -> list[Example]:
    cut = [
        Example(input_ids=example["input_ids"][:max_length], labels=example["labels"][:max_length])
        for example in examples
    ]
    return [one for one in cut if _n_learned([one])]


def _n_learned(examples: Iterable[Example]) -> int:
    # The first token is never predicted, so its label teaches nothing.
    return sum(label != IGNORED for one in examples for label in one["labels"][1:])


def _checked(record: Any) -> Record:
    """Return a record, or a row in any layout of `read_records`, as a record."""
    found = parse_record(record, "", require_answer=False)
    options: Any = {key: record[key] for key in ("context", "concatenate") if key in record}
    return Record(**{**options, **found})


def encode_prompt(
    messages: list[Message], tokenizer: Tokenizer, *, tools: Tools = None
) -> list[int]:
    """Tokenise a conversation and the header of the next answer.

    Raises:
        ValueError: no turn, no chat template, or one that refuses these turns or leaves one out.
    """
    if not messages:
        raise ValueError("There is no turn to answer: give at least one message.")
    record = _checked({"messages": messages, "tools": tools})
    text = render_prompt(record["messages"], tokenizer, tools=record.get("tools"))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def split_first_answer(record: Record, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return token ids before the first trained answer, and of that answer with its end token.

    Raises:
        ValueError: plain text, which has no prompt, or as `encode`.
    """
    if "text" in record:
        raise ValueError(
            "A plain text has no prompt that could be answered differently: "
            'give chat data ("messages", "prompt" and "completion", ...).'
        )
    example = next(iter(encode(record, tokenizer, max_length=None)), None)
    counted = [label != IGNORED for label in example["labels"]] if example else [True]
    start = counted.index(True)
    if example is None or start == 0:
        raise ValueError(
            "The record has no answer, or no token before it: give chat data with a question and "
            "an answer, and a chat template that shows both."
        )
    end = counted.index(False, start) if False in counted[start:] else len(counted)
    return example["input_ids"][:start], example["input_ids"][start:end]


def tokenize_records(
    records: Sequence[Record],
    tokenizer: Tokenizer,
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
    found = tokenize_each(records, tokenizer, max_length, progress=progress)
    return [example for examples in found.each for example in examples], found.n_dropped


class Tokenized(NamedTuple):
    """Hold the examples of each record, and the numbers of records that `max_length` shortens.

    Attributes:
        each: the examples of one record, together and inseparable; none is empty.
        n_dropped: records without an answer token within `max_length`; they are left out.
        n_cut: records of which a part of an answer is left out.
    """

    each: list[list[Example]]
    n_dropped: int
    n_cut: int


def tokenize_each(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    max_length: int | None,
    *,
    progress: bool = False,
) -> Tokenized:
    """Encode all records, as `tokenize_records`, with the examples of one record together."""
    if not len(records):
        raise ValueError("There are no records: give at least one.")
    each: list[list[Example]] = []
    n_cut = 0
    rows = bar(records, desc="tokenize", unit="record", disable=not progress)
    for number, record in enumerate(rows, start=1):
        try:
            whole = encode(record, tokenizer, max_length=None)
        except ValueError as error:
            raise ValueError(f"Record {number}: {error}") from None
        if examples := _cut(whole, max_length):
            each.append(examples)
            n_cut += _n_learned(examples) < _n_learned(whole)
    if not each:
        limit = "" if max_length is None else f" within max_length={max_length}"
        remedy = "give longer ones" if max_length is None else "raise max_length"
        raise ValueError(f"None of {len(records)} records has an answer token{limit}: {remedy}.")
    return Tokenized(each, len(records) - len(each), n_cut)


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


def _encode_chat(record: Record, tokenizer: Tokenizer) -> list[Example]:
    examples = []
    for text, spans, is_ended in render_answers(
        record["messages"], tokenizer, tools=record.get("tools"), context=record.get("context", 0)
    ):
        ids, labels = _tokens_with_labels(text, spans, tokenizer, add_special_tokens=False)
        end = [] if is_ended else [_end(tokenizer)]
        examples.append(Example(input_ids=ids + end, labels=labels + end))
    return examples


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The chat template does not end answers and the tokenizer has no end token, so the "
            "model would not learn to stop: use a tokenizer with an end token (eos_token)."
        )
    return tokenizer.eos_token_id


def _encode_plain(prompt: str, answer: str, tokenizer: Tokenizer) -> Example:
    """Encode prompt and answer verbatim, begun and ended by the special tokens, once."""
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
    text: str, spans: list[Span], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not report the characters of each token: use the "
            "fast tokenizer of this model (AutoTokenizer, with a tokenizer.json)."
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
    """Leave out the white space of ChatML and Gemma between the end token and the next turn.

    The model stops at the end token, so it never writes that white space itself.
    """
    for n, i in reversed(list(enumerate(inside, start=1))):
        if ids[i] in special:
            return inside[:n]
        if text[slice(*offsets[i])].strip():
            break
    return inside


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of the tokens for structure, not for text."""
    added = tokenizer.added_tokens_decoder
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def shared_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the common beginning of at least one sequence."""
    ordered = sorted(map(list, sequences))
    # The first and the last share the beginning of all.
    return ordered[0][: shared_length(ordered[0], ordered[-1])]
