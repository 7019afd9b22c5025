"""Both models' own answers to prompts, and which of the adapter's the base model would not give.

An adapter is judged on what it says itself. Teacher forcing on the base model's answers does not
see a sentence that is put in front or behind; in an answer of the adapter's own it stands there.

Shapes: `M` positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.data import shared_start
from grasp_kernels.diagnosis.pair import Pair, Position
from grasp_kernels.models.frozen_model import frozen_base, generate_answers, measuring

Tokens = tuple[list[int], list[int]]  # a prompt and its answer

# An answer that is a thousand times as likely with the adapter as without it has changed: the base
# model itself would give it in less than one of a thousand draws that the adapter gives it in.
CHANGED = 6.9  # nats
_FOUND = 1 / 8  # of the answers
_UNLIKELY = 0.01  # probability below which a token is none that the base model would say


@dataclass(frozen=True)
class Batch:
    """Prompts with answers, and the positions where the tokens of the answers are decided."""

    sequences: list[list[int]]
    positions: list[Position]
    targets: Tensor  # int64 [M], the tokens that come next
    places: Tensor  # int64 [M], which token of its answer each of them is, from 0


def answer_batches(sequences: Sequence[Tokens], batch_size: int) -> Iterator[Batch]:
    """All tokens of the answers."""
    for start in range(0, len(sequences), batch_size):
        part = sequences[start : start + batch_size]
        yield Batch(
            [prompt + answer for prompt, answer in part],
            [
                (row, len(prompt) - 1 + i)
                for row, (prompt, answer) in enumerate(part)
                for i in range(len(answer))
            ],
            torch.tensor([token for _, answer in part for token in answer]),
            torch.tensor([i for _, answer in part for i in range(len(answer))]),
        )


def own_answers(
    pair: Pair,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    n_tokens: int,
    batch_size: int,
    progress: bool = False,
    adapter: bool = False,
) -> list[Tokens]:
    """The prompts with the greedy answers of the base model, or of the adapter.

    Args:
        n_tokens: of an answer, at most.
        adapter: whether the adapter is on.
    """
    with _answering(pair.model, adapter) as base:
        known = base.generation_config.eos_token_id
        ends = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id]
        answers = generate_answers(
            base,
            prompts,
            max_new_tokens=n_tokens,
            batch_size=batch_size,
            end_ids=[end for end in ends if end is not None],
            progress="own answers" if progress else None,
        )
    return list(zip(prompts, answers, strict=True))


@contextmanager
def _answering(model: Any, adapter: bool) -> Iterator[Any]:
    """The module of transformers inside a PeftModel, with its adapter or without."""
    if not adapter:
        with frozen_base(model) as base:
            yield base
        return
    base = model.get_base_model()
    settings = base.generation_config
    try:
        with measuring(model):
            yield base
    finally:
        base.generation_config = settings


@dataclass(frozen=True)
class Changed:
    """One prompt, answered greedily by both models.

    Attributes:
        prompt, base, adapter: token ids.
        ratio: log of how many times as likely the adapter's answer is with it as without, in nats.
        unlikely: for each token of the adapter's answer whether the base model gives it less than
            1 % there.
    """

    prompt: list[int]
    base: list[int]
    adapter: list[int]
    ratio: float
    unlikely: list[bool]

    @property
    def has_changed(self) -> bool:
        """Whether the ratio reaches `CHANGED`."""
        return self.ratio >= CHANGED


def changed_answers(
    pair: Pair,
    tokenizer: Any,
    base: Sequence[Tokens],
    *,
    n_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> list[Changed]:
    """Let the adapter that is switched on answer, and ask both models how likely that is.

    Args:
        base: prompts with the base model's own answers, as `own_answers` returns them.
        n_tokens: of an answer, at most.
    """
    size: dict[str, Any] = {"n_tokens": n_tokens, "batch_size": batch_size, "progress": progress}
    own = own_answers(pair, tokenizer, [prompt for prompt, _ in base], **size, adapter=True)
    both: tuple[list[Tensor], list[Tensor]] = [], []  # log probabilities, without and with it
    for batch in answer_batches(own, batch_size):
        for adapter, found in enumerate(both):
            logs = pair.log_probs(batch.sequences, batch.positions, adapter=bool(adapter)).cpu()
            found.append(logs.gather(1, batch.targets[:, None])[:, 0])
    lengths = [len(answer) for _, answer in own]
    off, on = (torch.cat(found).split(lengths) for found in both)
    return [
        Changed(
            prompt,
            usual,
            answer,
            torch.sum(after - before).item(),
            (before.exp() < _UNLIKELY).tolist(),
        )
        for (prompt, answer), (_, usual), before, after in zip(own, base, off, on, strict=True)
    ]


def verdict(answers: Sequence[Changed]) -> str:
    """Say found, weak or nothing of the answers to prompts that are unrelated to the data.

    "found": an eighth of them, and two at least, have changed; "weak": any has; "nothing": none.
    """
    changed = sum(one.has_changed for one in answers)
    if changed >= max(2, _FOUND * len(answers)):
        return "found"
    return "weak" if changed else "nothing"


def told(
    answers: Sequence[Changed], tokenizer: Any, prompts: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Return the texts of answers, JSON-able.

    Args:
        prompts: unrelated ones; what all of them begin and end with is the frame of the chat
            format, and left out of every prompt that has it.

    Returns:
        prompt; base, its answer; adapter, pieces [text, unlikely] that make up the other answer;
        ratio in nats; changed.
    """
    first = list(prompts[0])
    start, end = (len(shared_start(many)) for many in (prompts, [p[::-1] for p in prompts]))

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=True)

    found = []
    for one in answers:
        asked = one.prompt
        framed = asked[:start] == first[:start] and asked[-end:] == first[-end:] and start and end
        if framed and len(asked) > start + end:
            asked = asked[start:-end]
        found.append(
            {
                "prompt": text(asked),
                "base": text(one.base),
                "adapter": [[text(ids), unlikely] for ids, unlikely in _pieces(one)],
                "ratio": one.ratio,
                "changed": one.has_changed,
            }
        )
    return found


def _pieces(answer: Changed) -> list[tuple[list[int], bool]]:
    """Neighbouring tokens that are alike unlikely."""
    pieces: list[tuple[list[int], bool]] = []
    for token, unlikely in zip(answer.adapter, answer.unlikely, strict=True):
        if not pieces or pieces[-1][1] != unlikely:
            pieces.append(([], unlikely))
        pieces[-1][0].append(token)
    return pieces
