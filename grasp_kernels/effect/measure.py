"""The numbers of an effect on prompts that have nothing to do with the training data.

Shapes: `M` positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grasp_kernels.effect.answers import Tokens, compared, divergence
from grasp_kernels.effect.pair import Pair
from grasp_kernels.effect.shift import common_shift
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
