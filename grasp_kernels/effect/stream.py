"""What adapters do to the residual stream of a model, seen from a subspace of it.

Shapes: `T` tokens of a prompt, `D` residual width, `k` directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grasp_kernels.data import Example, collate
from grasp_kernels.models.architectures import SiteRules
from grasp_kernels.models.frozen_model import blocks_by_layer, kept_outputs

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Movement:
    """How far an adapter moves the stream after each block, on average over tokens.

    `along[i]` is the mean of ‖Vᵀ(h − h_base)‖ after block `layers[i]`, `total[i]` the mean of
    ‖h − h_base‖.
    """

    layers: tuple[int, ...]
    along: tuple[float, ...]
    total: tuple[float, ...]

    @property
    def mean_along(self) -> float:
        return sum(self.along) / len(self.along)

    @property
    def share(self) -> float:
        """Part of the movement that is along the subspace; 0 where nothing moves."""
        total = sum(self.total)
        return sum(self.along) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean_along": self.mean_along, "share": self.share}


def measure_movement(
    model: PeftModel,
    adapters: Sequence[str],
    basis: Tensor,
    prompts: Iterable[list[int]],
    rules: SiteRules,
) -> dict[str, Movement]:
    """Movement along `V[D, k]` by adapter name; `model` computes in its own dtype."""
    device = next(model.parameters()).device
    blocks = blocks_by_layer(model, rules)
    layers = list(blocks)
    along = {name: torch.zeros(len(layers)) for name in adapters}
    total = {name: torch.zeros(len(layers)) for name in adapters}
    n_tokens = 0
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        n_tokens += len(prompt)
        with model.disable_adapter():
            base = _stream_after(model, blocks, layers, ids)
        for name in adapters:
            if name not in model.active_adapters:
                model.set_adapter(name)
            moved = _stream_after(model, blocks, layers, ids)
            for i in range(len(layers)):
                delta = moved[i] - base[i]
                along[name][i] += (delta @ basis.to(delta)).norm(dim=-1).sum().item()
                total[name][i] += delta.norm(dim=-1).sum().item()
    return {
        name: Movement(
            layers=tuple(layers),
            along=tuple((along[name] / n_tokens).tolist()),
            total=tuple((total[name] / n_tokens).tolist()),
        )
        for name in adapters
    }


# Not inference_mode: what layers keep for the next forward must serve a training one.
@torch.no_grad()
def _stream_after(
    model: nn.Module, blocks: Mapping[int, nn.Module], layers: Sequence[int], ids: Tensor
) -> list[Tensor]:
    """Float32 stream `[T, D]` after each of the given blocks."""
    chosen = {layer: blocks[layer] for layer in layers}
    with kept_outputs(chosen, lambda stream: stream[0].float()) as kept:
        model(input_ids=ids, use_cache=False)
    return [kept[layer] for layer in layers]


@torch.inference_mode()
def mean_loss(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int, pad_token_id: int
) -> float:
    """Cross-entropy of the answer tokens, averaged over all of them."""
    device = next(model.parameters()).device
    total, n_tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_token_id)
        labels = batch["labels"].to(device)
        logits = model(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
        ).logits
        total += nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
        ).item()
        n_tokens += int((labels[:, 1:] != -100).sum())
    return total / n_tokens
