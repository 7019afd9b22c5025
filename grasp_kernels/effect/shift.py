"""Does the adapter change all prompts in one and the same way?

The mean change of every token's log probability, over half of the prompts, is added to the base
model's own for the other half: what part of the adapter's effect there does it explain? A persona
says the same words to everybody; facts that leak, or answers that are forgotten, change other words
for every prompt, and their mean says little of the next one. No direction of the stream is needed
for it, so that what many directions carry together is seen too.

Shapes: `B` sequences of a batch, `M` positions, `S` tokens of the longest answer, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grasp_kernels.effect.answers import Tokens, compared, divergence
from grasp_kernels.effect.pair import Pair


def common_shift(pair: Pair, sequences: Sequence[Tokens], batch_size: int) -> float:
    """`1 − Σ KL(adapter ‖ base + shift) / Σ KL(adapter ‖ base)` over all answer tokens.

    1: the adapter shifts the log probabilities of every prompt alike; 0 and below: what it does to
    one prompt says nothing of another. Each half of the prompts is judged by the mean of the other
    half, at the same token of the answer. The shifts `[2, S, V]` are float32, of the other half 0
    where none of its answers is as long. Four forwards a prompt.
    """
    sums: Tensor | None = None
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
