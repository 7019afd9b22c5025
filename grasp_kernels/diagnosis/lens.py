"""What a direction of the stream speaks of: tokens that the unembedding ties to its two ends.

The logit lens (nostalgebraist 2020): the direction as it stands after the last block, through the
final norm and the unembedding.

Shapes: `D` residual width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grasp_kernels.effect.pair import Pair
from grasp_kernels.effect.tokens import ends
from grasp_kernels.run.stream import token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def lens(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, vector: Tensor, count: int
) -> dict[str, Any]:
    """Tokens that the direction `[D]` raises ("up") and lowers ("down"), strongest first."""
    scores = token_scores(pair.base, vector[:, None], pair.rules)
    return ends(scores[:, 0], tokenizer, count)


def token_ids(shown: Sequence[dict[str, Any]]) -> Tensor:
    """Int64 `[n]` of what `lens` lists."""
    return torch.tensor([token["id"] for token in shown])
