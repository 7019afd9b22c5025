"""Chat data: JSONL file -> records -> token ids with labels on the answers alone.

Shapes: `B` records of a batch, `T` tokens of the longest of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from grasp_kernels.chat_template import Message, Span, answer_spans, is_answer, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of tokens that take no part in the loss (torch's cross_entropy default)


class Record(TypedDict, total=False):
    """One training example: a conversation (`messages`) or plain text (`text`)."""

    messages: list[Message]
    context: int  # so many turns at the beginning are given, not trained on
    concatenate: bool  # prompt and completion were strings: they work without a chat template
    text: str


class Example(TypedDict):
    """What a causal language model trains on; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]


_EXPECTED = (
    'expected one JSON object per line with "messages", "prompt" and "completion", "instruction" '
    'and "output", "user" and "assistant", "query" and "answer", or "text"'
)
_STRING_PAIRS = (("instruction", "output"), ("user", "assistant"), ("query", "answer"))


def read_records(path: str | Path, *, require_answer: bool = True) -> list[Record]:
    """Read chat data, one JSON object a line; each line may have its own format.

    Formats: `messages`; `prompt`/`completion` (strings or lists of messages; only the completion
    is trained on); `instruction`/`input`/`output`; `user`/`assistant`; `query`/`answer`; `text`.
    Other keys are ignored, blank lines are skipped. `require_answer=False` also takes records that
    end with the question.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the first malformed line by its number, or a file without records.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: give a JSONL file with chat data.")
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    records.append(_parse_line(line, require_answer))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}.") from None
    if not records:
        raise ValueError(f"{path} has no records: {_EXPECTED}.")
    return records


def _parse_line(line: bytes, require_answer: bool) -> Record:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8, expected a file in UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}), {_EXPECTED}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__} and not an object, {_EXPECTED}")
    record = _parse_row(row, require_answer)
    turns = record.get("messages", [])[record.get("context", 0) :]
    if require_answer and "text" not in record and not any(map(is_answer, turns)):
        raise ValueError('no turn has the role "assistant", expected at least one answer to learn')
    return record


def _parse_row(row: dict[str, Any], require_answer: bool) -> Record:
    if "messages" in row:
        return {"messages": _messages(row["messages"], "messages")}
    if "prompt" in row and ("completion" in row or not require_answer):
        return _prompt_completion(row)
    for question, answer in _STRING_PAIRS:
        if question in row and (answer in row or not require_answer):
            text = _text(row[question], question)
            if question == "instruction" and row.get("input"):
                text = f"{text}\n\n{_text(row['input'], 'input')}"
            turns = [{"role": "user", "content": text}]
            if answer in row:
                turns.append({"role": "assistant", "content": _text(row[answer], answer)})
            return {"messages": turns}
    if "text" in row:
        return {"text": _text(row["text"], "text")}
    raise ValueError(f"unknown keys {sorted(row)}, {_EXPECTED}")


def _prompt_completion(row: dict[str, Any]) -> Record:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, list) and (isinstance(completion, list) or completion is None):
        turns = _messages(prompt, "prompt")
        answers = _messages(completion, "completion") if completion is not None else []
        return {"messages": turns + answers, "context": len(turns)}
    turns = [{"role": "user", "content": _text(prompt, "prompt")}]
    if completion is None:
        return {"messages": turns}
    turns.append({"role": "assistant", "content": _text(completion, "completion")})
    return {"messages": turns, "concatenate": True}


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{key}" is {_shorten(value)}, expected a list with at least one message')
    return [_message(message, f"{key}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(
            f'{where} is {_shorten(message)}, expected {{"role": ..., "content": ...}}'
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f'{where} has no "role", expected "system", "user" or "assistant"')
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(_text(part.get("text"), f"{where}.content") for part in content)
    return {**message, "role": role, "content": _text(content, f"{where}.content")}


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" is {_shorten(value)}, expected a string that is not empty')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f'"{key}" has half of a surrogate pair, expected valid Unicode')
    return value


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


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
