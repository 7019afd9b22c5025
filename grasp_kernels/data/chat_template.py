"""Where the answers stand in a conversation that a Hugging Face chat template has rendered.

Nothing is guessed from the words of a template: an answer is what the rendering up to its turn has
beyond the rendering that asks for it, or what the template's own generation markers enclose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # {"role": str, "content": str} and whatever else the template knows
Span = tuple[int, int]  # characters [start, end) of a rendering

_GENERATION_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")


def is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text, with the header of the next answer if asked for.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses these turns.
    """
    with _template_errors(messages, tokenizer):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )


def answer_spans(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, context: int = 0
) -> tuple[str, list[Span]]:
    """The rendered conversation and the characters of its answers, their end of turn included.

    Args:
        context: answers in so many turns at the beginning are left out.

    Raises:
        ValueError: as `render`, or a template that renders a turn differently once others follow.
    """
    with _template_errors(messages, tokenizer):
        marked = _GENERATION_MARKER.search(tokenizer.get_chat_template()) is not None
    find = _marked_spans if marked else _prefix_spans
    return find(messages, tokenizer, context)


def _prefix_spans(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[str, list[Span]]:
    text = render(messages, tokenizer)
    spans = []
    for i in range(context, len(messages)):
        if not is_answer(messages[i]):
            continue
        if i == 0:
            raise ValueError(
                "The conversation begins with an answer: put a user turn before it, or use a "
                "chat template with {% generation %} markers."
            )
        before = render(messages[:i], tokenizer, add_generation_prompt=True)
        upto = render(messages[: i + 1], tokenizer)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise ValueError(
                f"The chat template renders turn {i + 1} of {len(messages)} differently when "
                "more turns follow or when it asks for an answer: keep one answer per record, "
                "or use a chat template with {% generation %} markers."
            )
        spans.append((len(before), len(upto)))
    return text, spans


def _marked_spans(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[str, list[Span]]:
    # apply_chat_template(return_assistant_tokens_mask=True) renders the same way, but loses or
    # overruns an answer that begins or ends with a character without a token (transformers 5.23).
    from transformers.utils.chat_template_utils import render_jinja_template

    with _template_errors(messages, tokenizer):
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    n_answers = sum(map(is_answer, messages))
    # A template may mark an answer in parts; only a context needs to know which part is whose.
    if (n_answers and not spans[0]) or (context and len(spans[0]) != n_answers):
        raise ValueError(
            f"The {{% generation %}} markers of the chat template enclose {len(spans[0])} parts "
            f"where the conversation has {n_answers} answers: put them around every assistant "
            "turn, or remove them."
        )
    return texts[0], spans[0][sum(map(is_answer, messages[:context])) :]


@contextmanager
def _template_errors(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template to render messages with: "
            "set tokenizer.chat_template, or use a checkpoint whose tokenizer has one."
        )
    try:
        yield
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"The chat template refuses the turns {roles}: {error}.") from None
