"""Chat data: JSONL file -> records -> token ids with labels on the answers alone.

Shapes: `B` records of a batch, `T` tokens of the longest of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from grasp_kernels.data.chat_template import Message, is_answer

if TYPE_CHECKING:
    pass


class Record(TypedDict, total=False):
    """One training example: a conversation (`messages`) or plain text (`text`)."""

    messages: list[Message]
    context: int  # so many turns at the beginning are given, not trained on
    concatenate: bool  # prompt and completion were strings: they work without a chat template
    text: str


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
