"""The adapter's own answers beside the base model's, and how unlikely the base model finds them.

An adapter is judged on what it says itself. Teacher forcing on the base model's answers does not
see a sentence that is put in front or behind; in an answer of the adapter's own it stands there.

Shapes: `n` tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grasp_kernels.data import shared_start
from grasp_kernels.effect.answers import Tokens, answer_batches, own_answers
from grasp_kernels.effect.pair import Pair

# An answer that is a thousand times as likely with the adapter as without it has changed: the base
# model itself would give it in less than one of a thousand draws that the adapter gives it in.
CHANGED = 6.9  # nats
_FOUND = 1 / 8  # of the answers
_UNLIKELY = 0.01  # probability below which a token is none that the base model would say


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


def verdict(answers: Sequence[Changed]) -> str:
    """Say found, weak or nothing of the answers to prompts that are unrelated to the data.

    "found": an eighth of them, and two at least, have changed; "weak": any has; "nothing": none.
    """
    changed = sum(one.has_changed for one in answers)
    if changed >= max(2, _FOUND * len(answers)):
        return "found"
    return "weak" if changed else "nothing"


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
    prompts = [prompt for prompt, _ in base]
    own = own_answers(
        pair,
        tokenizer,
        prompts,
        n_tokens=n_tokens,
        batch_size=batch_size,
        progress=progress,
        adapter=True,
    )
    found: list[Changed] = []
    for start, batch in zip(
        range(0, len(own), batch_size), answer_batches(own, batch_size), strict=True
    ):
        targets = batch.targets[:, None]
        off, on = (
            pair.log_probs(batch.sequences, batch.positions, adapter=adapter)
            .cpu()
            .gather(1, targets)[:, 0]
            for adapter in (False, True)
        )  # [n of the whole batch]
        lengths = [len(answer) for _, answer in own[start : start + batch_size]]
        rows = zip(off.split(lengths), on.split(lengths), strict=True)
        for (before, after), (prompt, answer), (_, usual) in zip(
            rows,
            own[start : start + batch_size],
            base[start : start + batch_size],
            strict=True,
        ):
            unlikely = (before.exp() < _UNLIKELY).tolist()
            ratio = torch.sum(after - before).item()
            found.append(Changed(prompt, usual, answer, ratio, unlikely))
    return found
