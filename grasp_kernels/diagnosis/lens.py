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

from grasp_kernels.diagnosis.pair import Pair
from grasp_kernels.run.stream import token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ends(scores: Tensor, tokenizer: PreTrainedTokenizerBase, count: int) -> dict[str, Any]:
    """The tokens with the largest and the smallest of the scores `[V]`, as text with score and id.

    Embeddings are often padded beyond the vocabulary; those rows are no tokens.
    """
    scores = scores[: len(tokenizer)].cpu()
    count = min(count, len(scores) // 2)
    return {
        "up": _tokens(scores.topk(count).indices, scores, tokenizer),
        "down": _tokens((-scores).topk(count).indices, scores, tokenizer),
    }


def lens(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, vector: Tensor, count: int
) -> dict[str, Any]:
    """Tokens that the direction `[D]` raises ("up") and lowers ("down"), strongest first."""
    scores = token_scores(pair.base, vector[:, None], pair.rules)
    return ends(scores[:, 0], tokenizer, count)


def neutral_shift(
    off: Tensor, on: Tensor, tokenizer: PreTrainedTokenizerBase, count: int
) -> dict[str, Any]:
    """Tokens whose mean probability over prompts the adapter raises and lowers most.

    Args:
        off, on: log probabilities `[M, V]` of the base model and of the adapter.
    """
    return ends((on.exp() - off.exp()).mean(dim=0), tokenizer, count)


def _tokens(
    ids: Tensor, scores: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    return [
        {"id": i, "token": tokenizer.decode([i]), "score": scores[i].item()} for i in ids.tolist()
    ]


def token_ids(shown: Sequence[dict[str, Any]]) -> Tensor:
    """Int64 `[n]` of what `lens` lists."""
    return torch.tensor([token["id"] for token in shown])
