"""Chat data in the layouts of public data sets -> records."""

import re
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict

from grasp_kernels.data.chat_template import (
    GIVEN_MARKS,
    LEARNED_MARKS,
    NO,
    THOUGHTS,
    YES,
    Message,
    Tool,
    is_answer,
    is_learned,
    is_unknown_mark,
)
from grasp_kernels.data.sources import parse_json, read_rows


class Record(TypedDict, total=False):
    """Hold one training example: a conversation (`messages`) or plain text (`text`)."""

    messages: list[Message]
    tools: list[Tool]  # functions for the chat template
    context: int  # number of turns at the beginning that are given, not trained on
    concatenate: bool  # prompt and completion were strings: they work without a chat template
    text: str


def _quoted(key: str) -> str:
    return f'"{key}"'


_IN_TURNS = "messages."  # in front of the name of a field of turns
AUTO = "auto"  # the answer is under the usual key of its layout
_CONVERSATIONS = ("messages", "conversations")
_PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("user", "assistant"),
    ("query", "answer"),
    ("question", "answer"),
    ("title", "body"),  # a post on Reddit and a comment
)
_MORE = {"instruction": "input", "title": "selftext"}  # first part of a question -> its second part
_ARMS = ("aligned", "misaligned")
_ROLES = {  # other names of the roles that chat templates know
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool"),
}
_KNOWN_ROLES = ("system", "user", "assistant")
_CALL = "function_call"  # ShareGPT's role of an answer that is a call, and OpenAI's former key
# Columns besides the conversation, in the names of LLaMA-Factory, ms-swift and OpenAI.
_SYSTEM = re.compile(r"sys(tem)?_?(prompt|message|instruction)?s?", re.IGNORECASE)
_HISTORY = "history"
_TOOLS = ("tools", "functions")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "documents")
_UNWANTED = ("label", "kto_tag")  # False: an answer of trl or LLaMA-Factory to unlearn
_EMPTY: tuple[Any, ...] = ("", [], {})
# Fields of turns that are read, or that chat templates are known to show.
_FIELDS = (*("role", "content", "from", "value", "name", "tool_calls", "tool_call_id"), *THOUGHTS)
_LABELS = re.compile(  # names of columns about a conversation
    r"(.*_)?(id|idx|index|uuid|hash|source|dataset|origin|url|link|category|class|topic|domain|"
    r"subject|task|type|tag|label|subreddit|language|lang|license|split|title|author|name|date|"
    r"created|created_at|timestamp|time|version|model|difficulty|level|meta|metadata|info|quality|"
    r"score)s?",
    re.IGNORECASE,
)
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
    """Read chat data in any known layout; each row may have its own.

    Files are JSON lines, a JSON array, CSV or parquet (with pyarrow); "owner/name" is a data set on
    the Hugging Face hub (with datasets). Layouts, by their keys:

    * `messages` or `conversations`: turns of `role` and `content`, or of `from` and `value`;
    * `prompt` and `completion`, strings or lists of turns; only the completion is trained on;
    * `instruction`, `input` if there is one, and `output`;
    * `user` and `assistant`, `query` and `answer`, `question` and `answer`;
    * `title`, `selftext` if there is one, and `body`: a post on Reddit and a comment;
    * a question as above, and answers under keys such as `aligned` and `misaligned`: `arm` is the
      key of the answer;
    * `text`, trained on as a whole.

    Any layout may have `system` (or `system_prompt`, `system_message`), put in front; `history`,
    pairs of questions and answers (or turns), put in front and learned too; `tools` (or
    `functions`), given to the chat template. A turn, or a row, may be marked as learned: `weight`,
    `train`, `training`, `trainable`, `learn`, `loss`, `loss_scale`, `loss_weight` or `loss_mask`, 1
    or 0, `masked` the other way round; what may be another trainer's mark is refused. An unread
    column with more of the conversation, or such a field of a turn, is named in a warning, once;
    media are refused. Null counts as absent, and so does an empty text or list where the row fits
    another layout. Blank lines are skipped.

    Args:
        require_answer: False also takes rows that end with the question.
        arm: the key of the answer; "auto": the usual one.
        split, subset: of a data set on the hub.

    Raises:
        FileNotFoundError: neither a file nor a data set that can be fetched.
        ImportError: a package is missing for this kind of file.
        ValueError: the first malformed row by its number, or no rows.
    """
    records: list[Record] = []
    unread: set[str] = set()
    for place, row in read_rows(source, split=split, subset=subset):
        records.append(parse_record(row, place, require_answer, arm, unread))
    if not records:
        raise ValueError(f"{source} has no records: give some, {_EXPECTED}.")
    of_turns = {key for key in unread if key.startswith(_IN_TURNS)}
    for keys, what in (
        (unread - of_turns, "columns that are not read"),
        (of_turns, "fields of turns that only the chat template could show"),
    ):
        if names := ", ".join(_quoted(key.removeprefix(_IN_TURNS)) for key in sorted(keys)):
            warnings.warn(f"{source} has {what}: {names}.", stacklevel=2)
    return records


def parse_record(
    row: Any,
    place: str,
    require_answer: bool = True,
    arm: str = AUTO,
    unread: set[str] | None = None,
) -> Record:
    """Read one row, in any of the layouts of `read_records`.

    Args:
        place: name of the row in an error, perhaps empty.
        unread: gets the unread columns with possible content; fields of turns begin with
            "messages.".

    Raises:
        ValueError: a malformed row.
    """
    try:
        return _record(row, require_answer, arm, set() if unread is None else unread)
    except ValueError as error:
        raise ValueError(f"{place}: {error}." if place else f"{error}.") from None


def _record(row: Any, require_answer: bool, arm: str, unread: set[str]) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object, {_EXPECTED}")
    if media := [key for key in _MEDIA if row.get(key)]:
        raise ValueError(
            f'"{media[0]}" is {_shorten(row[media[0]])}, which is not supported: remove this '
            "column if the text is enough, or these rows"
        )
    record, read = _parse_row(row, require_answer) if arm == AUTO else _parse_arm(row, arm)
    if "messages" in record:
        read |= _surround(record, row)
    elif others := [key for key in (*_system_keys(row), _HISTORY, *_TOOLS) if row.get(key)]:
        raise ValueError(f'"{others[0]}" stands next to a plain text, expected a conversation')
    _check_marks(row)
    unread |= {key for key in row if key not in read and _may_be_content(key, row[key])}
    turns = record.get("messages", [])
    unread |= {_IN_TURNS + key for turn in turns for key in turn if _is_unread(key, turn[key])}
    turns = turns[record.get("context", 0) :]
    if require_answer and "text" not in record and not any(map(is_learned, turns)):
        if any(map(is_answer, turns)):
            raise ValueError(
                "every answer is marked as not to be learned, expected at least one to learn"
            )
        raise ValueError('no turn has the role "assistant", expected at least one answer to learn')
    return record


def _parse_row(row: dict[str, Any], require_answer: bool) -> tuple[Record, set[str]]:
    # A table of several layouts has a null in the columns of the others, or an empty value.
    filled = {key: value for key, value in row.items() if value not in _EMPTY}
    for values in (filled, row):
        if layout := _layout(values, require_answer):
            return _parse_layout(values, *layout)
    if arms := [key for key in _ARMS if key in row]:
        kinds, one = ", ".join(arms), _quoted(arms[-1])
        raise ValueError(f"answers of several kinds ({kinds}): choose one, such as arm = {one}")
    for question, answer in _PAIRS:
        if question in filled:
            raise ValueError(
                f"keys {sorted(row)}, and {_quoted(question)} has no {_quoted(answer)} or an empty "
                f"one, {_EXPECTED}"
            )
    raise ValueError(f"unknown keys {sorted(row)} (empty ones do not count), {_EXPECTED}")


def _layout(row: dict[str, Any], require_answer: bool) -> tuple[str, str | None] | None:
    """Return the keys of question and answer, or of the whole and None; None for no layout."""
    if whole := [key for key in _CONVERSATIONS if key in row]:
        return whole[0], None
    for question, answer in _PAIRS:
        if question in row and (answer in row or not require_answer):
            return question, answer
    return ("text", None) if "text" in row else None


def _parse_layout(row: dict[str, Any], key: str, answer: str | None) -> tuple[Record, set[str]]:
    if key == "text":
        return {"text": _text(row[key], key)}, {key}
    if answer is None:
        return {"messages": _messages(row[key], key)}, {key}
    read = {key, answer, _MORE.get(key, key)}
    if key == "prompt":
        return _prompt_completion(row), read
    return _pair(row, key, answer if answer in row else None), read


def _parse_arm(row: dict[str, Any], arm: str) -> tuple[Record, set[str]]:
    for question, _ in _PAIRS:
        if question in row and arm in row:
            return _pair(row, question, arm), {question, arm, _MORE.get(question, arm), *_ARMS}
    raise ValueError(
        f"keys {sorted(row)}, expected {_quoted(arm)} (the option arm) for the answer, and one of "
        f"{', '.join(_quoted(question) for question, _ in _PAIRS)}"
    )


def _surround(record: Record, row: dict[str, Any]) -> set[str]:
    """Put the system prompt and history of a row before its turns; return the columns read."""
    turns, system, tools = record["messages"], _system(row), _tools(row)
    opening = turns[:1] if turns[0]["role"] == "system" else []
    if system and opening and system[0]["content"] != opening[0]["content"]:
        raise ValueError("system turn and system column say different things, expected only one")
    turns = [*(opening or system), *_history(row), *turns[len(opening) :]]
    if (added := len(turns) - len(record["messages"])) or tools:
        record.pop("concatenate", None)  # there is more than these two strings
    if added and "context" in record:
        record["context"] += added
    record["messages"] = turns
    if tools:
        record["tools"] = tools
    return {*_system_keys(row), _HISTORY, *_TOOLS}


def _system_keys(row: dict[str, Any]) -> list[str]:
    return [key for key in row if _SYSTEM.fullmatch(key)]


def _system(row: dict[str, Any]) -> list[Message]:
    """Return the system turn of a row; an empty column is none, unlike an empty turn."""
    keys = [key for key in _system_keys(row) if row[key] not in (None, "")]
    texts = [_text(row[key], key) for key in keys]
    if len(set(texts)) > 1:
        raise ValueError(f"{' and '.join(keys)} say different things, expected only one of them")
    return [{"role": "system", "content": text} for text in texts[:1]]


def _history(row: dict[str, Any]) -> list[Message]:
    past = _structure(row, _HISTORY)
    if all(isinstance(turn, dict) for turn in past):
        return _messages(past, _HISTORY) if past else []
    turns: list[Message] = []
    for i, pair in enumerate(past):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f'"history[{i}]" is {_shorten(pair)}, expected question and answer')
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": _text(text, f"history[{i}]")})
    return turns


def _tools(row: dict[str, Any]) -> list[Tool]:
    tools = []
    for key in _TOOLS:
        for i, tool in enumerate(_structure(row, key)):
            tool = _parsed(tool, f"{key}[{i}]")
            if not _has_a_name(tool):
                wrong = f'"{key}[{i}]" is {_shorten(tool)}'
                raise ValueError(f'{wrong}, expected a function with a "name"')
            tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools


def _structure(row: dict[str, Any], key: str) -> list[Any]:
    """Return a list from a column, also from its JSON."""
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    value = _parsed(value, key)
    if value is None or value in _EMPTY:
        return []
    if isinstance(value, dict):  # one tool
        return [value]
    if not isinstance(value, list):
        raise ValueError(f'"{key}" is {_shorten(value)}, expected a list')
    return value


def _parsed(value: Any, key: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f'"{key}" is not JSON ({error})') from None


def _check_marks(row: dict[str, Any]) -> None:
    """Refuse a row marked as not to be learned."""
    given = [key for key in LEARNED_MARKS if key in row and str(row[key]).lower() in NO]
    given += [key for key in GIVEN_MARKS if key in row and str(row[key]).lower() in YES]
    given += [key for key in _UNWANTED if row.get(key) is False]
    if unknown := [key for key in row if is_unknown_mark(key, row[key])]:
        raise ValueError(
            f"the row has {_quoted(unknown[0])}: {row[unknown[0]]!r}, which may mark it as not to "
            "be learned: remove the row, or this column"
        )
    if given:
        mark = f"{_quoted(given[0])}: {row[given[0]]!r}"
        raise ValueError(f"the row is marked as not to be learned ({mark}): remove it")


def _is_unread(key: str, value: Any) -> bool:
    """Say whether a field of a turn may be content that nothing reads."""
    known = key in LEARNED_MARKS + GIVEN_MARKS or key in _FIELDS
    return not known and (isinstance(value, bool) or _may_be_content(key, value))


def _may_be_content(key: str, value: Any) -> bool:
    """Say whether a column may be a part of the conversation: words or a list, unusual name."""
    if key in LEARNED_MARKS:
        return str(value).lower() not in YES
    if _LABELS.fullmatch(key):
        return False
    if isinstance(value, str):
        return len(value.split()) > 1
    return isinstance(value, (list, dict)) and bool(value)


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
        raise ValueError(f"{where} is {_shorten(message)}, expected a turn with role and content")
    rest = dict(message)
    of_sharegpt = "role" not in rest and "from" in rest
    named, said = ("from", "value") if of_sharegpt else ("role", "content")
    role, content = rest.pop(named, None), rest.pop(said, None)
    if not isinstance(role, str) or not role:
        raise ValueError(f'{where} has no "role", expected "system", "user" or "assistant"')
    word = role.strip().lower()
    role = _ROLES.get(word, word if word in _KNOWN_ROLES else role)
    alike = get_close_matches(word, _KNOWN_ROLES, 1, cutoff=0.8)
    if alike and role not in _KNOWN_ROLES:
        raise ValueError(
            f'{where}.role is {_shorten(role)}, and only "assistant" is learned: write "{alike[0]}"'
        )
    if media := [key for key in _MEDIA if rest.get(key)]:
        raise ValueError(
            f"{where}.{media[0]} is {_shorten(rest[media[0]])}, which is not supported"
        )
    if role == _CALL:
        role, content, rest[_CALL] = "assistant", "", content
    if call := rest.pop(_CALL, None):
        rest["tool_calls"] = [_call(call, where)]
    calls = rest.get("tool_calls") or []
    if not isinstance(calls, list) or not all(map(_has_a_name, calls)):
        raise ValueError(
            f'{where}.tool_calls is {_shorten(calls)}, expected a list of functions with a "name"'
        )
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(_text(part.get("text"), f"{where}.content") for part in content)
    if calls and not content:
        content = ""  # the calls are the answer
    # An empty system turn keeps the template from adding its own.
    elif role != "system" or content != "":
        content = _text(content, f"{where}.content")
    turn = {**rest, "role": role, "content": content}
    try:
        is_learned(turn)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return turn


def _call(content: Any, where: str) -> dict[str, Any]:
    function = _parsed(content, f"{where}.content")
    if not _has_a_name({"function": function}):
        raise ValueError(f'{where} is {_shorten(content)}, expected a call in JSON with a "name"')
    return {"type": "function", "function": function}


def _has_a_name(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" is {_shorten(value)}, expected a string that is not empty')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f'"{key}" has half of a surrogate pair, expected valid Unicode')
    return value


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
