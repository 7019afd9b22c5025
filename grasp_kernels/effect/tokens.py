"""Scores of the vocabulary -> the tokens at both ends of them.

Shapes: `M` positions, `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

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
