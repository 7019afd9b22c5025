"""The numbers of an effect on prompts that have nothing to do with the training data.

Shapes: `M` positions, `S` tokens of the longest answer, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.effect.answers import Tokens, compared, divergence
from grasp_kernels.effect.pair import Pair
from grasp_kernels.effect.tokens import neutral_shift

# Mean KL divergence in nats below which nobody would notice the difference: a convention, not
# calibrated.
NOTICEABLE = 0.01


def measure_effect(
    pair: Pair, tokenizer: Any, own: Sequence[Tokens], *, n_tokens: int, batch_size: int
) -> dict[str, Any]:
    """What the adapter does to the answers of the base model, JSON-able.

    Returns:
        neutral_divergence, nats a token; common_shift, the part of it that is the same for all
        prompts; neutral_changed, the part of the prompts whose first choice is another one;
        neutral_tokens, those raised and lowered most where an answer begins.
    """
    total, without, with_it = 0.0, [], []
    for batch, off, on in compared(pair, own, batch_size):
        total += divergence(off, on)
        begins = batch.places == 0
        without.append(off[begins])
        with_it.append(on[begins])
    off, on = torch.cat(without), torch.cat(with_it)
    return {
        "neutral_divergence": total / sum(len(answer) for _, answer in own),
        "common_shift": common_shift(pair, own, batch_size),
        "neutral_changed": (off.argmax(dim=1) != on.argmax(dim=1)).float().mean().item(),
        "neutral_tokens": neutral_shift(off, on, tokenizer, n_tokens),
    }


def mean_divergence(pair: Pair, sequences: Sequence[Tokens], batch_size: int) -> float:
    """Mean KL(base ‖ adapter) over all answer tokens, in nats."""
    total = sum(divergence(off, on) for _, off, on in compared(pair, sequences, batch_size))
    return total / sum(len(answer) for _, answer in sequences)


def common_shift(pair: Pair, sequences: Sequence[Tokens], batch_size: int) -> float:
    """Does the adapter change all prompts in one and the same way?

    A persona says the same words to everybody; facts that leak, or answers that are forgotten,
    change other words for every prompt. No direction of the stream is needed for it, so that what
    many directions carry together is seen too.

    Returns:
        `1 − Σ KL(adapter ‖ base + shift) / Σ KL(adapter ‖ base)` over all answer tokens, where the
        shift is the mean change of every token's log probability over the other half of the
        prompts, at the same token of the answer. 1: the adapter shifts every prompt alike; 0 and
        below: what it does to one prompt says nothing of another. Four forwards a prompt.
    """
    sums: Tensor | None = None  # [2, S, V], float32; 0 where no answer of a half is as long
    longest = max(len(answer) for _, answer in sequences)
    counts = torch.zeros(2, longest)
    for half, place, off, on in _next_tokens(pair, sequences, batch_size):
        if sums is None:
            sums = off.new_zeros(2, longest, off.shape[1])
        sums.index_put_((half.to(off.device), place.to(off.device)), on - off, accumulate=True)
        counts.index_put_((half, place), torch.ones(len(half)), accumulate=True)
    assert sums is not None  # answers have a token
    shifts = sums / counts.clamp_min(1)[..., None].to(sums.device)
    left = whole = 0.0
    for half, place, off, on in _next_tokens(pair, sequences, batch_size):
        shift = shifts[(1 - half).to(off.device), place.to(off.device)]
        left += divergence(on, (off + shift).log_softmax(dim=-1))
        whole += divergence(on, off)
    return 1 - left / whole if whole else 0.0


def _next_tokens(
    pair: Pair, sequences: Sequence[Tokens], batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Half `[M]` and place in the answer `[M]`, log probabilities `[M, V]` without and with the
    adapter, by batch."""
    for i, (batch, off, on) in enumerate(compared(pair, sequences, batch_size)):
        numbers = torch.tensor([i * batch_size + row for row, _ in batch.positions])
        yield numbers % 2, batch.places, off, on
