"""Prompts -> the base model's own answers, and the positions where their tokens are decided.

Shapes: `M` positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.effect.pair import Pair, Position
from grasp_kernels.models.frozen_model import frozen_base, generate_answers, measuring

Tokens = tuple[list[int], list[int]]  # a prompt and its answer


@dataclass(frozen=True)
class Batch:
    """Sequences, and the positions whose next token counts."""

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


def compared(
    pair: Pair, sequences: Sequence[Tokens], batch_size: int
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """By batch, log probabilities `[M, V]` of the answer tokens without and with the adapter."""
    for batch in answer_batches(sequences, batch_size):
        off, on = (
            pair.log_probs(batch.sequences, batch.positions, adapter=adapter)
            for adapter in (False, True)
        )
        yield batch, off, on


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


def divergence(first: Tensor, second: Tensor) -> float:
    """Sum over positions of KL(first ‖ second) of log probabilities `[M, V]`, in nats."""
    return (first.exp() * (first - second)).sum().item()
