"""The change that an adapter makes in the base model's own answers, and its tokens.

Shapes: `M` positions, `V` vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp_kernels.data import IGNORED, Example, collate
from grasp_kernels.data.chat_template import Tokenizer
from grasp_kernels.diagnosis.answers import Tokens, answer_batches
from grasp_kernels.diagnosis.pair import Pair

_INPUTS = ("input_ids", "labels", "attention_mask")


def measure_effect(
    pair: Pair, tokenizer: Tokenizer, own: Sequence[Tokens], *, n_tokens: int, batch_size: int
) -> dict[str, Any]:
    """Measure the change that the adapter makes in given answers, JSON-able.

    Returns:
        divergence, KL(base ‖ adapter) in nats a token; tokens, the tokens that the adapter raises
        ("up") and lowers ("down") most, by their mean probability at the start of an answer.
    """
    total, changes = 0.0, []
    for batch in answer_batches(own, batch_size):
        off, on = (
            pair.log_probs(batch.sequences, batch.positions, adapter=adapter)
            for adapter in (False, True)
        )
        total += F.kl_div(on, off, reduction="sum", log_target=True).item()
        begins = batch.places == 0
        changes.append(on[begins].exp() - off[begins].exp())
    return {
        "divergence": total / sum(len(answer) for _, answer in own),
        "tokens": ends(torch.cat(changes).mean(dim=0), tokenizer, n_tokens),
    }


def ends(scores: Tensor, tokenizer: Tokenizer, count: int) -> dict[str, Any]:
    """Return the tokens with the largest and the smallest scores `[V]`: text, score and id.

    Embeddings are often padded beyond the vocabulary; the rows of the padding are left out.
    """
    scores = scores[: len(tokenizer)].cpu()
    count = min(count, len(scores) // 2)
    order = {"up": scores.topk(count).indices, "down": (-scores).topk(count).indices}
    return {
        end: [
            {"id": i, "token": tokenizer.decode([i]), "score": scores[i].item()}
            for i in ids.tolist()
        ]
        for end, ids in order.items()
    }


@torch.no_grad()  # FSDP2 cannot gather weights again that it gathered in inference_mode
def mean_loss(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int, pad_token_id: int
) -> float:
    """Return the mean cross-entropy of the answer tokens, in nats."""
    device = next(model.parameters()).device
    total, n_tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_token_id)
        ids, labels, mask = (batch[key].to(device) for key in _INPUTS)
        logits = model(input_ids=ids, attention_mask=mask).logits
        total += F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
        ).item()
        n_tokens += int((labels[:, 1:] != IGNORED).sum())
    return total / n_tokens
