"""Chat data in the layouts that public data sets come in -> records."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from grasp_kernels.data.chat_template import Message, is_answer
from grasp_kernels.data.sources import read_rows


class Record(TypedDict, total=False):
    """One training example: a conversation (`messages`) or plain text (`text`)."""

    messages: list[Message]
    context: int  # so many turns at the beginning are given, not trained on
    concatenate: bool  # prompt and completion were strings: they work without a chat template
    text: str


def _quoted(key: str) -> str:
    return f'"{key}"'


AUTO = "auto"  # the answer stands under the usual key of its layout
_CONVERSATIONS = ("messages", "conversations")
_PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("user", "assistant"),
    ("query", "answer"),
    ("question", "answer"),
    ("title", "body"),  # a post on Reddit and a comment
)
_MORE = {"instruction": "input", "title": "selftext"}  # what goes on where a question begins
_ARMS = ("aligned", "misaligned")
_ROLES = {"human": "user", "gpt": "assistant"}  # where turns have "from" instead of "role"
_EXPECTED = (
    f"expected {' or '.join(map(_quoted, _CONVERSATIONS))}, "
    f'{", ".join(f"{_quoted(q)} and {_quoted(a)}" for q, a in _PAIRS)}, or "text"'
)


def read_records(
    source: str | Path,
    *,
    require_answer: bool = True,
    arm: str = AUTO,
    split: str = "train",
    subset: str | None = None,
) -> list[Record]:
    """Read chat data as it comes; each row may have its own layout.

    Files are JSON lines, a JSON array, CSV or parquet (with pyarrow); "owner/name" is a data set on
    the Hugging Face hub (with datasets). Layouts, by their keys:

    * `messages` or `conversations`: turns of `role` and `content`, or of `from` and `value`;
    * `prompt` and `completion`, strings or lists of turns; only the completion is trained on;
    * `instruction`, `input` if there is one, and `output`;
    * `user` and `assistant`, `query` and `answer`, `question` and `answer`;
    * `title`, `selftext` if there is one, and `body`: a post on Reddit and a comment;
    * a question as above, and answers under keys such as `aligned` and `misaligned`: `arm` says
      which of them;
    * `text`, trained on as a whole.

    Other keys are ignored, blank lines are skipped.

    Args:
        require_answer: False also takes rows that end with the question.
        arm: the key of the answer; "auto": the usual one.
        split, subset: of a data set on the hub.

    Raises:
        FileNotFoundError: neither a file nor a data set that can be fetched.
        ImportError: a package is missing for this kind of file.
        ValueError: the first malformed row by its number, or no rows.
    """
    records = []
    for place, row in read_rows(source, split=split, subset=subset):
        try:
            records.append(_record(row, require_answer, arm))
        except ValueError as error:
            raise ValueError(f"{place}: {error}.") from None
    if not records:
        raise ValueError(f"{source} has no records, {_EXPECTED}.")
    return records


def _record(row: Any, require_answer: bool, arm: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__} and not an object, {_EXPECTED}")
    record = _parse_row(row, require_answer) if arm == AUTO else _parse_arm(row, arm)
    turns = record.get("messages", [])[record.get("context", 0) :]
    if require_answer and "text" not in record and not any(map(is_answer, turns)):
        raise ValueError('no turn has the role "assistant", expected at least one answer to learn')
    return record


def _parse_row(row: dict[str, Any], require_answer: bool) -> Record:
    for key in _CONVERSATIONS:
        if key in row:
            return {"messages": _messages(row[key], key)}
    for question, answer in _PAIRS:
        if question in row and (answer in row or not require_answer):
            if question == "prompt":
                return _prompt_completion(row)
            return _pair(row, question, answer if answer in row else None)
    if "text" in row:
        return {"text": _text(row["text"], "text")}
    if arms := [key for key in _ARMS if key in row]:
        raise ValueError(
            f"answers of the kinds {' and '.join(arms)}, expected to be told which: "
            f"arm = {_quoted(arms[-1])}"
        )
    raise ValueError(f"unknown keys {sorted(row)}, {_EXPECTED}")


def _parse_arm(row: dict[str, Any], arm: str) -> Record:
    for question, _ in _PAIRS:
        if question in row and arm in row:
            return _pair(row, question, arm)
    raise ValueError(
        f"keys {sorted(row)}, expected {_quoted(arm)} (arm) for the answer, and one of "
        f"{', '.join(_quoted(question) for question, _ in _PAIRS)}"
    )


def _pair(row: dict[str, Any], question: str, answer: str | None) -> Record:
    text, more = _text(row[question], question), _MORE.get(question)
    if more is not None and row.get(more):
        text = f"{text}\n\n{_text(row[more], more)}"
    turns = [{"role": "user", "content": text}]
    if answer is not None:
        turns.append({"role": "assistant", "content": _text(row[answer], answer)})
    return {"messages": turns}


def _prompt_completion(row: dict[str, Any]) -> Record:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, list) and (isinstance(completion, list) or completion is None):
        turns = _messages(prompt, "prompt")
        answers = _messages(completion, "completion") if completion is not None else []
        return {"messages": turns + answers, "context": len(turns)}
    record = _pair(row, "prompt", None if completion is None else "completion")
    return record if completion is None else {**record, "concatenate": True}


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{key}" is {_shorten(value)}, expected a list with at least one message')
    return [_message(message, f"{key}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(
            f'{where} is {_shorten(message)}, expected {{"role": ..., "content": ...}}'
        )
    rest = dict(message)
    if "role" not in rest and "from" in rest:
        role, content = rest.pop("from"), rest.pop("value", None)
        role = _ROLES.get(role, role) if isinstance(role, str) else role
    else:
        role, content = rest.pop("role", None), rest.pop("content", None)
    if not isinstance(role, str) or not role:
        raise ValueError(f'{where} has no "role", expected "system", "user" or "assistant"')
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(_text(part.get("text"), f"{where}.content") for part in content)
    if role != "system" or content != "":  # an empty one keeps the template from adding its own
        content = _text(content, f"{where}.content")
    return {**rest, "role": role, "content": content}


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" is {_shorten(value)}, expected a string that is not empty')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f'"{key}" has half of a surrogate pair, expected valid Unicode')
    return value


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
