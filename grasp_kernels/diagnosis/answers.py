"""Both models' own answers to prompts, and the changed answers among those of the adapter.

An adapter is judged by its own answers. Teacher forcing on the base model's answers does not see a
sentence in front of or behind an answer; the adapter's own answer has it.

Shapes: `M` positions, `V` vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grasp_kernels.data import shared_start
from grasp_kernels.diagnosis.pair import Pair, Position
from grasp_kernels.models.frozen_model import frozen_base, generate_answers

Tokens = tuple[list[int], list[int]]  # a prompt and its answer

# An answer has changed if it is a thousand times as likely with the adapter as without: the base
# model itself would give it less than once where the adapter gives it a thousand times.
CHANGED = 6.9  # nats
_FOUND = 1 / 8  # part of the answers
_UNLIKELY = 0.01  # the base model would hardly say a token below this probability


class Batch(NamedTuple):
    """Hold prompts with answers, and the positions where the answer tokens are predicted."""

    sequences: list[list[int]]
    positions: list[Position]
    targets: Tensor  # int64 [M], the tokens that come next
    places: Tensor  # int64 [M], index of each token in its answer, from 0


def answer_batches(sequences: Sequence[Tokens], batch_size: int) -> Iterator[Batch]:
    """Yield batches with all tokens of the answers."""
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
    """Return the prompts with the greedy answers of the base model, or of the adapter.

    Args:
        n_tokens: tokens of an answer, at most.
        adapter: True: the adapter is on.
    """
    with frozen_base(pair.model, adapter=adapter) as base:
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


@dataclass(frozen=True)
class Changed:
    """Prompt with the greedy answers of both models.

    Attributes:
        prompt, base, adapter: token ids.
        ratio: log of the adapter answer's probability with the adapter over that without, in nats.
        unlikely: for each token of the adapter's answer: True if the base model gives it less than
            1 % there.
    """

    prompt: list[int]
    base: list[int]
    adapter: list[int]
    ratio: float
    unlikely: list[bool]

    @property
    def has_changed(self) -> bool:
        """Whether the ratio is at least `CHANGED`."""
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
    """Let the active adapter answer, and compare the answer's likelihood under both models.

    Args:
        base: prompts with the base model's own answers, as `own_answers` returns them.
        n_tokens: tokens of an answer, at most.
    """
    size: dict[str, Any] = {"n_tokens": n_tokens, "batch_size": batch_size, "progress": progress}
    own = own_answers(pair, tokenizer, [prompt for prompt, _ in base], **size, adapter=True)
    both: tuple[list[Tensor], list[Tensor]] = [], []  # log probabilities, adapter off and on
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
    """Return the verdict on answers to prompts that are unrelated to the data.

    "found": at least an eighth of the answers, and at least two, have changed; "weak": at least
    one has; "nothing": none has.
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
        prompts: unrelated prompts. Their common start and end is the frame of the chat format,
            and is left out of every prompt that has it.

    Returns:
        For each answer: prompt; base, the base model's answer; adapter, the adapter's answer as
        pieces [text, unlikely]; ratio in nats; changed.
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
    """Group neighbouring tokens with the same value of `unlikely`."""
    runs = groupby(zip(answer.adapter, answer.unlikely, strict=True), key=itemgetter(1))
    return [([token for token, _ in run], unlikely) for unlikely, run in runs]
