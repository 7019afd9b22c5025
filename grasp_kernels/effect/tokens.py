"""Scores of the vocabulary -> the tokens at both ends of them; a direction -> such scores.

Shapes: `M` positions, `V` vocabulary, `D` width of the stream, `k` directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from grasp_kernels.models.architectures import Site, SiteRules
from grasp_kernels.models.frozen_model import find_blocks

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
    model: Any, tokenizer: PreTrainedTokenizerBase, basis: Tensor, rules: SiteRules, count: int
) -> list[dict[str, Any]]:
    """What each direction `[D, k]` of the stream raises ("up") and lowers ("down") most.

    The logit lens (nostalgebraist 2020): the direction as it stands after the last block, through
    the final norm and the unembedding. The sign of a direction is arbitrary.
    """
    return [ends(column, tokenizer, count) for column in token_scores(model, basis, rules).mT]


def token_scores(model: Any, basis: Tensor, rules: SiteRules) -> Tensor:
    """Float32 `[V, k]`: what directions `[D, k]` at the end of the stream add to logits.

    Linear in the direction: the norm's division by the size of the stream is left out.
    """
    holder, _ = find_blocks(model, rules)
    name = ".".join((holder, *rules.blocks.split(".")[:-1], rules.final_norm))
    norm: Any = model.get_submodule(name)
    end = Site("the last block", rules.final_norm, rules.norms)
    unembedding = model.get_output_embeddings().weight.float()
    return unembedding @ end.to_stream(basis.to(unembedding), end.gain(norm.weight))


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
