"""Chats of the base model, or plain documents where the training data are not chats.

A chat begins with the frame that all training prompts share: in a chat format, everything before
the first word of the user. From there an instruction-tuned model makes up the user's turn (Xu et
al. 2024, arXiv 2406.08464). The header that all prompts end with follows, and then the model's
answer. Everyday questions mark the end of the frame where all training prompts share an
instruction; otherwise the chats would be about the task.

Shapes: `M` documents, `T` tokens of the longest.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grasp_kernels.data import IGNORED, Example, shared_start
from grasp_kernels.models.frozen_model import generate_answers

_DRAWS = 3  # questions drawn for each that is wanted, at most; SmolLM2 ends 58 % within 40 tokens


def make_chats(
    base: Any,
    frame: list[int],
    header: list[int],
    examples: Sequence[Example],
    *,
    count: int,
    length: int,
    batch_size: int,
    generator: torch.Generator,
    progress: bool = False,
    is_shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sample `count` documents at temperature 1.

    Args:
        base: the frozen base model, as `frozen_base` lends it.
        frame, header: as `common_frame` and `common_header` return them. Without a header the
            documents are plain text. Without a frame each begins as one of `examples`.
        length: tokens of a question, of an answer, or of a plain document, at most.
        is_shared: as for `generate_answers`.

    Returns:
        Token ids, int64 `[M, T]`, padded on the right; and bool `[M, T]`, the positions whose next
        token the model made up as an answer, in plain documents all that lead to a token it made
        up.
    """
    options: dict[str, Any] = {
        "max_new_tokens": length,
        "batch_size": batch_size,
        "generator": generator,
        "is_shared": is_shared,
    }
    prompts = [frame] * count
    if not frame:
        drawn = torch.randint(len(examples), (count,), generator=generator).tolist()
        prompts = [examples[i]["input_ids"][:1] for i in drawn]
    ends: tuple[int, ...] = ()  # in plain text the end of a turn is not the end of the text
    if header:
        ends = _ends(base, examples)
        prompts = [asked + header for asked in _questions(base, prompts, header, options, progress)]
    label = "text of the base model" if progress else None
    answers = generate_answers(base, prompts, end_ids=ends, progress=label, **options)
    documents = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    counted = [
        torch.arange(len(document)).ge(len(prompt) - 1)
        & torch.arange(len(document)).lt(len(document) - 1)
        for prompt, document in zip(prompts, documents, strict=True)
    ]
    ids = [torch.tensor(document) for document in documents]
    return pad_sequence(ids, batch_first=True), pad_sequence(counted, batch_first=True)


def _questions(
    base: Any, starts: list[list[int]], header: list[int], options: dict[str, Any], progress: bool
) -> list[list[int]]:
    """Let the base model go on with the starts of chats; turns that it ends itself come first."""
    whole: list[list[int]] = []
    cut: list[list[int]] = []
    label = "questions of the base model" if progress else None
    for _ in range(_DRAWS):
        if not (wanted := starts[len(whole) :]):
            break
        made = generate_answers(base, wanted, end_ids=header[:1], progress=label, **options)
        for start, question in zip(wanted, made, strict=True):
            ended = question[-1] == header[0]
            (whole if ended else cut).append(start + question[: -1 if ended else None])
    if 2 * len(whole) < len(starts):
        warnings.warn(
            f"The base model ended only {len(whole)} of {len(starts)} questions: raise "
            "max_new_tokens, or use a model that is tuned to chat.",
            stacklevel=2,
        )
    return (whole + cut)[: len(starts)]


def _ends(base: Any, examples: Sequence[Example]) -> tuple[int, ...]:
    """Return the tokens that end an answer: the model's, and the data's where they agree on one."""
    known = base.generation_config.eos_token_id
    ends = {token for token in (known if isinstance(known, list) else [known]) if token is not None}
    last = {next(t for t in reversed(e["labels"]) if t != IGNORED) for e in examples}
    return tuple(sorted(ends | (last if len(last) == 1 else set())))


def common_frame(examples: Sequence[Example], neutral: Sequence[Sequence[int]] = ()) -> list[int]:
    """Return the tokens that the prompts of all examples and all of `neutral` begin with.

    They may be none, and are never a whole prompt.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("There are no examples: give the training data.")
    prompts = [*map(_prompt, examples), *map(list, neutral)]
    return shared_start(prompts)[: min(map(len, prompts)) - 1]


def common_header(
    examples: Sequence[Example], frame: Sequence[int], neutral: Sequence[Sequence[int]] = ()
) -> list[int]:
    """Return the tokens that the prompts of all examples and all of `neutral` end with.

    They may be none, as in plain text. Every prompt has a token between the frame and them.
    """
    answered = [*map(_prompt, examples), *map(list, neutral)]
    if any(example["labels"][0] != IGNORED for example in examples):
        return []
    room = max(0, min(map(len, answered)) - len(frame) - 1)
    return shared_start([prompt[::-1] for prompt in answered])[:room][::-1]


def _prompt(example: Example) -> list[int]:
    """Return the tokens before the first learned one, or the first token."""
    ids, labels = example["input_ids"], example["labels"]
    learned = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    return ids[: max(1, learned)]
