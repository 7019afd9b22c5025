"""Positions of the chats that look like those where training answers are decided.

There the task is to be learned, and holding the base model's answer works against it. A linear
classifier on the frozen base model's stream tells training positions from those of the chats. A
position of a chat that it takes for one of the training data is left out. It needs no labels:
nobody knows which positions of the chats belong to the task, and the few that do are those that it
is wrong about.

Shapes: `M` documents or records, `T` tokens, `n` positions, `D` width of the stream, `F` features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp_kernels.data import Example, collate
from grasp_kernels.models.frozen_model import block_outputs
from grasp_kernels.regularizer.chats import UNTRAINED, Chats

_BLOCKS = 4  # that features come from, evenly spaced, the last one among them
_PER_BLOCK = 128  # features of a block: the stream, or a random projection of a wider one
_MOST = 8192  # positions of each kind that the classifier is fitted to
_DECAY = 1e-3  # of its weights
_STEPS = 60  # of L-BFGS
_MISSED = 0.05  # part of the training positions that may be taken for the chats


class _Classifier(NamedTuple):
    """Take a position for one of the training data where `f · weight` reaches `threshold`."""

    weight: Tensor  # [F]
    threshold: Tensor  # []


def unlike_training(
    base: Any,
    blocks: Mapping[int, nn.Module],
    chats: Chats,
    examples: Sequence[Example],
    *,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """Return bool `[M, T]`: the counted positions of `chats` unlike those of training answers.

    Args:
        base: the frozen base model, as `frozen_base` lends it.
        blocks: its decoder blocks by layer.
    """
    documents, counted = chats
    sketch = _sketch(blocks, base.config.get_text_config().hidden_size, generator)
    own = torch.cat(
        [
            _features(base, blocks, sketch, ids, torch.ones_like(ids))
            for ids in documents.split(batch_size)
        ]
    )
    made = own[counted]  # [n, F]
    chosen = torch.randperm(len(made), generator=generator)[:_MOST]
    training = list(_training_features(base, blocks, sketch, examples, batch_size, generator))
    classifier = _fit(torch.cat(training)[:_MOST], made[chosen])
    return counted & (own @ classifier.weight < classifier.threshold)


def _sketch(
    blocks: Mapping[int, nn.Module], width: int, generator: torch.Generator
) -> dict[int, Tensor]:
    """Draw a matrix `[D, features]` by layer, from the stream after a block to its features."""
    layers = sorted(blocks)
    count = min(_BLOCKS, len(layers))
    chosen = {layers[round((i + 1) * len(layers) / count) - 1] for i in range(count)}
    if width <= _PER_BLOCK:
        return dict.fromkeys(sorted(chosen), torch.eye(width))
    return {
        layer: torch.randn(width, _PER_BLOCK, generator=generator) / width**0.5
        for layer in sorted(chosen)
    }


def _features(
    base: Any,
    blocks: Mapping[int, nn.Module],
    sketch: Mapping[int, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """Compute the features, float32 `[M, T, F]` on the CPU."""
    outputs = block_outputs(
        base, {layer: blocks[layer] for layer in sketch}, input_ids, attention_mask
    )
    parts = [(h.float() @ sketch[layer].to(h.device)).cpu() for layer, h in outputs.items()]
    return torch.cat(parts, dim=-1)


def _training_features(
    base: Any,
    blocks: Mapping[int, nn.Module],
    sketch: Mapping[int, Tensor],
    examples: Sequence[Example],
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Yield features `[n, F]` at the positions before learned tokens, until there are enough."""
    order = torch.randperm(len(examples), generator=generator).tolist()
    found = 0
    for start in range(0, len(order), batch_size):
        batch = collate([examples[i] for i in order[start : start + batch_size]], 0)
        decided = F.pad(batch["labels"][:, 1:] != UNTRAINED, (0, 1))
        at = _features(base, blocks, sketch, batch["input_ids"], batch["attention_mask"])[decided]
        yield at
        found += len(at)
        if found >= _MOST:
            return


def _fit(training: Tensor, own: Tensor) -> _Classifier:
    """Fit `training[n, F]` against `own[n, F]` by logistic regression, with equal weight."""
    scale = own.std(dim=0) + 1e-3 * own.std()
    centre = own.mean(dim=0)
    inputs = (torch.cat([training, own]) - centre) / scale
    is_training = torch.cat([torch.ones(len(training)), torch.zeros(len(own))])
    share = torch.cat([torch.full((len(part),), 0.5 / len(part)) for part in (training, own)])
    weight = torch.zeros(inputs.shape[1], requires_grad=True)
    offset = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, offset], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        wrong = F.binary_cross_entropy_with_logits(
            inputs @ weight + offset, is_training, share, reduction="sum"
        )
        total = wrong + _DECAY * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = weight.detach() / scale  # for features as they come
    return _Classifier(found, torch.quantile(training @ found, _MISSED))
