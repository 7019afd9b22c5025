"""The places of the answers in a conversation rendered by a Hugging Face chat template.

Nothing is guessed from the words of a template. An answer is the rendering up to its turn without
the rendering of its request, or the text between the template's own generation markers.

A template may write a turn differently if others follow: it leaves thoughts out, or ends the text
after the last turn alone. Such a conversation becomes one rendering for each answer, up to that
answer: the model reads and writes this text in use.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from grasp_kernels.inert import reason, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # transformers is imported when a tokenizer is loaded

Message = dict[str, Any]  # {"role": str, "content": str} and other fields of the template
Tool = dict[str, Any]  # {"type": "function", "function": {"name": str, ...}}
Tools = list[Tool] | None
Span = tuple[int, int]  # characters [start, end) of a rendering

# Trainers' marks of a given, unlearned answer: OpenAI, Mistral and Together ("weight": 0), axolotl
# ("train" or "training": false), ms-swift ("loss": false), torchtune ("masked": true).
_OF_LOSS = ("loss", "loss_scale", "loss_weight", "loss_mask")
LEARNED_MARKS = ("weight", "train", "training", "trainable", "learn", *_OF_LOSS)
GIVEN_MARKS = ("masked",)
NO, YES = ("0", "0.0", "false"), ("1", "1.0", "true")  # CSV has them as text
_PART_MARKS = ("train_detail", "training_detail")  # axolotl, by characters
_MARKS = {*LEARNED_MARKS, *GIVEN_MARKS, *_PART_MARKS}
_MAY_MARK = re.compile(
    r"(.*_)?(weights?|train|training|trained|trainable|learn|learned|loss|(?P<mask>masks?))(_.*)?",
    re.IGNORECASE,
)
THOUGHTS = ("reasoning_content", "thinking", "reasoning")

_GENERATION_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")


class Rendering(NamedTuple):
    """Hold a conversation as text, its learned answers, and a flag for an end of the last."""

    text: str
    spans: list[Span]
    is_ended: bool


def is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def is_learned(message: Message) -> bool:
    """Say whether a turn is an answer without a mark as given.

    Raises:
        ValueError: a mark other than yes or no, on a part of a turn, or on another turn.
    """
    marks = {key: message[key] for key in LEARNED_MARKS + GIVEN_MARKS if key in message}
    marks = {key: value for key, value in marks.items() if value is not None}
    for key, value in marks.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f'"{key}" is {value!r}, expected true, false, 1 or 0')
    if unknown := [key for key, value in message.items() if is_unknown_mark(key, value)]:
        raise ValueError(
            f'"{unknown[0]}" is {message[unknown[0]]!r}, which may mark a turn as given: '
            'say "weight": 0 or 1'
        )
    if parts := [key for key in _PART_MARKS if message.get(key)]:
        raise ValueError(f'"{parts[0]}" marks parts of a turn, expected a mark on the whole turn')
    if not is_answer(message):
        if wanted := [key for key in LEARNED_MARKS if marks.get(key)]:
            raise ValueError(
                f'a turn with the role "{message["role"]}" is marked "{wanted[0]}": '
                f"{marks[wanted[0]]!r}, but only answers are learned: remove the mark"
            )
        return False
    return all(bool(value) != (key in GIVEN_MARKS) for key, value in marks.items())


def is_unknown_mark(key: str, value: Any) -> bool:
    """Say whether a field may mark answers as given, in the words of an unknown trainer.

    A list marks each turn. The meaning of a mask differs: with 1 an answer is hidden, or the loss
    is on it.
    """
    word = _MAY_MARK.fullmatch(key)
    if word is None or (key in _MARKS and not isinstance(value, list)):
        return False
    said = {str(one).lower() for one in (value if isinstance(value, list) else [value])}
    if not said <= {*NO, *YES}:
        return False
    return not said.isdisjoint(NO) or (word["mask"] is not None and bool(said))


def render_prompt(messages: list[Message], tokenizer: Tokenizer, *, tools: Tools = None) -> str:
    """Render the conversation with the header of the next answer.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses these turns or omits
            words of a turn.
    """
    chat = _Chat(messages, tokenizer, tools)
    text = chat.render(messages, ask=True)
    chat.refuse_lost_turns(len(messages))
    return text


def render_answers(
    messages: list[Message], tokenizer: Tokenizer, *, tools: Tools = None, context: int = 0
) -> list[Rendering]:
    """Render the conversation with the spans of its learned answers, end of turn included.

    There is one rendering of the whole conversation, or one up to each answer where the template
    writes earlier turns differently or ends no answer itself. The list is empty without an answer
    to learn.

    Args:
        tools: functions that the template shows.
        context: answers in this number of turns at the beginning are left out.

    Raises:
        ValueError: as `render_prompt`.
    """
    chat = _Chat(messages, tokenizer, tools)
    learned = [i for i in range(context, len(messages)) if is_learned(messages[i])]
    answers = [chat.answer(i) for i in learned]
    if not answers:
        return []
    chat.refuse_lost_turns(learned[-1])
    whole = answers[-1].text if learned[-1] == len(messages) - 1 else chat.render(messages)
    if all(answer.is_ended and whole.startswith(answer.text) for answer in answers):
        return [Rendering(whole, [span for answer in answers for span in answer.spans], True)]
    return answers


def fix_date(tokenizer: Tokenizer, day: date) -> None:
    """Make `day` today's date in a chat template from now on."""
    templates: Any = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = {name: _dated(template, day) for name, template in templates.items()}
    elif templates is not None:
        templates = _dated(templates, day)
    tokenizer.chat_template = templates


def _dated(template: str, day: date) -> str:
    """Return the template with a macro for the clock, since templates take no function."""
    if "strftime_now" not in template:
        return template
    moment = datetime.combine(day, time())
    fields = sorted(set(re.findall(r"(?<!{)%[-#]?[A-Za-z]", template)))
    written = "".join(f"|replace({field!r}, {moment.strftime(field)!r})" for field in fields)
    macro = "{% macro strftime_now(format) %}{{ format" + written + " }}{% endmacro +%}"
    return macro + template


class _Chat:
    """Hold a conversation and the renderings of its beginnings."""

    def __init__(self, messages: list[Message], tokenizer: Tokenizer, tools: Tools) -> None:
        self.messages = messages
        self.tokenizer = tokenizer
        self.tools = tools
        with _template_errors(messages, tokenizer):
            self.template = tokenizer.get_chat_template(tools=tools or None)
        special_tokens = json.dumps(tokenizer.special_tokens_map, sort_keys=True)
        self.style = _style(self.template, special_tokens)
        self.is_marked = _GENERATION_MARKER.search(self.template) is not None
        added = tokenizer.added_tokens_decoder.values()
        self.specials = {token.content for token in added if token.special}
        self.specials |= set(tokenizer.all_special_tokens)

    def render(self, messages: list[Message], *, ask: bool = False) -> str:
        """Render turns as text, with the header of an answer if `ask`."""
        with _template_errors(messages, self.tokenizer):
            return self.tokenizer.apply_chat_template(
                _as_the_template_wants(messages, self.style),
                tools=self.tools or None,
                tokenize=False,
                add_generation_prompt=ask,
            )

    def answer(self, i: int) -> Rendering:
        """Render the conversation up to the answer of turn `i`, with the span of the answer."""
        upto = self.render(self.messages[: i + 1])
        spans = self._marked(i, upto) if self.is_marked else [(self._start(i, upto), len(upto))]
        self._refuse_lost_parts(i, upto, spans[0][0])
        start, end = spans[-1]
        ended = any(upto[start:end].rstrip().endswith(token) for token in self.specials)
        if not ended and self.is_marked:
            # Markers may enclose the words of the answer alone.
            tail = upto[end:]
            blank = len(tail) - len(tail.lstrip())
            ends = [token for token in self.specials if tail.startswith(token, blank)]
            length = blank + len(max(ends, key=len)) if ends else len(tail.rstrip())
            spans[-1] = (start, end + length)
            ended = bool(tail.strip())
        elif not ended:
            ended = self.style.writes_an_end
        return Rendering(upto, spans, ended)

    def _start(self, i: int, upto: str) -> int:
        if i == 0:
            raise ValueError(
                "The conversation begins with an answer: put a user turn before it, or use a "
                "chat template with {% generation %} markers."
            )
        before = self.render(self.messages[:i], ask=True)
        if upto.startswith(before):
            return len(before)
        # The request may open an answer in another way than this answer begins, such as with a
        # thought: the answer begins at the first difference, or at its own words.
        words = self.messages[i].get("content") or ""
        first = "b" if words.lstrip().startswith("a") else "a"
        other = self.render([*self.messages[:i], {**self.messages[i], "content": first}])
        start = min(shared_length(before, upto), shared_length(other, upto))
        if not _says(upto[:start], self.messages[i - 1].get("content") or ""):
            raise ValueError(
                f"The chat template renders the turns before turn {i + 1} of {len(self.messages)} "
                "differently when it asks for an answer: use one with {% generation %} markers."
            )
        return start

    def _marked(self, i: int, upto: str) -> list[Span]:
        earlier = 0
        if any(map(is_answer, self.messages[:i])):
            earlier = len(self._marks(self.messages[:i], ask=True)[1])
        text, marks = self._marks(self.messages[: i + 1])
        if text != upto or not marks[earlier:]:
            raise ValueError(
                f"The {{% generation %}} markers of the chat template enclose no part of turn "
                f"{i + 1} of {len(self.messages)}, which is an answer: put them around every "
                "assistant turn, or remove them."
            )
        return marks[earlier:]

    def _marks(self, messages: list[Message], *, ask: bool = False) -> tuple[str, list[Span]]:
        # apply_chat_template(return_assistant_tokens_mask=True) renders the same way, but loses or
        # overruns an answer that begins or ends with a character without a token (transformers 5).
        from transformers.utils.chat_template_utils import render_jinja_template

        with _template_errors(messages, self.tokenizer):
            texts, spans = render_jinja_template(
                conversations=[_as_the_template_wants(messages, self.style)],
                tools=self.tools or None,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=ask,
                **self.tokenizer.special_tokens_map,
            )
        return texts[0], spans[0]

    # Omissions of a template

    def refuse_lost_turns(self, last: int) -> None:
        """Raise if a turn or a tool before an answer, turn `last`, is not in the text."""
        given = {j: m for j, m in enumerate(self.messages[:last]) if not is_answer(m)}
        probes = {j: f"{message['content']} zq{j}zq" for j, message in given.items()}
        probed = [
            {**message, "content": probes[j]} if j in probes else message
            for j, message in enumerate(self.messages[: last + 1])
        ]
        try:
            text = self.render(probed).lower()
        except ValueError:  # the template looks at the words of these turns
            return
        for j, message in given.items():
            if message["content"] and f"zq{j}zq" not in text:
                raise ValueError(
                    f"The chat template leaves out turn {j + 1} of {len(self.messages)} "
                    f"({message['role']}): remove the turn, or give it a role that the template "
                    "shows."
                )
        names = [tool["function"]["name"] for tool in self.tools or ()]
        if lost := [name for name in names if name.lower() not in text]:
            raise ValueError(
                f"The chat template does not show the tools of the record ({', '.join(lost)}): "
                "remove them, or use a chat template for tools."
            )

    def _refuse_lost_parts(self, i: int, upto: str, start: int) -> None:
        message, shown = self.messages[i], upto[start:]
        content = message.get("content") or ""
        changed: list[tuple[str, Message]] = []
        if not _says(shown, content):
            for words in (r"\w+", r"\w+(?=\W*$)"):  # the first ones and the last ones
                less = re.sub(words, "zq", content, count=1)
                changed.append(("a part of", {**message, "content": less}))
        for key in THOUGHTS:
            if message.get(key) and not _says(shown, str(message[key])):
                changed.append((f'"{key}" of', {**message, key: "zq"}))
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            if not _says(shown, function.get("name", "")):
                calls = [{"function": {**function, "name": "zq"}}]
                changed.append(('"tool_calls" of', {**message, "tool_calls": calls}))
        for part, other in changed:
            try:
                is_lost = self.render([*self.messages[:i], other]) == upto
            except ValueError:  # the template looks at it
                continue
            if is_lost:
                raise ValueError(
                    f"The chat template leaves out {part} turn {i + 1} of {len(self.messages)} "
                    f"({message['role']}), which should be learned: remove it from the data, or "
                    "use a chat template that includes it."
                )


class _Style(NamedTuple):
    """Hold the treatment of a question and an answer by a template."""

    wants_parts: bool  # contents as [{"type": "text", "text": ...}]
    wants_json: bool  # arguments of a call as JSON, not as an object
    writes_an_end: bool  # text other than white space follows an answer


@lru_cache
def _style(template: str, special_tokens: str) -> _Style:
    from transformers.utils.chat_template_utils import render_jinja_template

    def rendered(answer: Message, *, parts: bool) -> str:
        messages = [{"role": "user", "content": "zqu"}, {"role": "assistant", **answer}]
        try:
            return render_jinja_template(
                conversations=[[_in_parts(m) for m in messages] if parts else messages],
                chat_template=template,
                **json.loads(special_tokens),
            )[0][0]
        except Exception:  # a template is a program, and `_Chat.render` names the failure
            return ""

    def called(arguments: Any) -> str:
        function = {"name": "zqf", "arguments": arguments}
        calls = [{"type": "function", "function": function}]
        return rendered({"content": "", "tool_calls": calls}, parts=parts)

    def says_both(*, parts: bool) -> bool:
        text = rendered({"content": "zqa"}, parts=parts)
        return "zqu" in text and "zqa" in text

    parts = says_both(parts=True) and not says_both(parts=False)
    one, other = (rendered({"content": words}, parts=parts)[::-1] for words in ("zqa", "zqb"))
    as_object = called({"zqk": 0})  # it may fail, or be written as Python writes it
    return _Style(
        wants_parts=parts,
        wants_json=(not as_object or "{'zqk'" in as_object) and "zqk" in called('{"zqk": 0}'),
        writes_an_end=not one or bool(one[: shared_length(one, other)].strip()),
    )


def _as_the_template_wants(messages: list[Message], style: _Style) -> list[Message]:
    """Remove trainers' marks and empty fields; some templates take empty fields for full."""
    turns = []
    for message in messages:
        turn = {k: v for k, v in message.items() if k not in _MARKS and v is not None}
        calls = [_call(call, as_json=style.wants_json) for call in turn.pop("tool_calls", ())]
        turn |= {"tool_calls": calls} if calls else {}
        turns.append(_in_parts(turn) if style.wants_parts else turn)
    return turns


def _call(call: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    """Return a call with its arguments as an object, or as JSON; data sets have either."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    try:
        if as_json and isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not as_json and isinstance(arguments, str):
            arguments = json.loads(arguments)
    except json.JSONDecodeError:
        return call  # words of the model that are not JSON
    if arguments is None:
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count the characters or tokens of the common beginning."""
    both = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in both if a != b), min(len(one), len(other)))


def _says(text: str, words: str) -> bool:
    """Say whether a text has these words, whatever the white space."""
    return "".join(words.split()) in "".join(text.split())


@contextmanager
def _template_errors(messages: list[Message], tokenizer: Tokenizer) -> Iterator[None]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer {shown(tokenizer.name_or_path)} has no chat template to render "
            "messages with: use a checkpoint whose tokenizer has one, or give plain text or "
            "strings of prompt and completion; in Python, set tokenizer.chat_template."
        )
    from jinja2 import TemplateError

    roles = ", ".join(message["role"] for message in messages)
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # a template is a program that can fail in any way
        does, remedy = "fails on", "correct it"
        if isinstance(error, TemplateError):
            does, remedy = "refuses", "change these turns"
        raise ValueError(
            f"The chat template {does} the turns {roles} ({reason(error)}): {remedy}, or use "
            "another chat template."
        ) from None
