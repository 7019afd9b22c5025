"""Text -> second moments of the inputs of layers.

Layers that are given the same tensor (`q_proj`, `k_proj`, `v_proj`) share one moment. All moments
of a large model at once would not fit beside it, so the text is read once for each group of layers
whose moments do.

Shapes: `B` sequences of a batch, `T` tokens, K in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.models.frozen_model import batches, pad

_BYTES = 4  # of a float32
# That show which layers share an input. The inputs of all layers are held meanwhile: of 2048 tokens
# of an 8B model 3.5 GB, of these 0.1.
_PROBED_TOKENS = 64

Layers = Mapping[str, nn.Module]


def input_groups(
    base: Any, layers: Layers, widths: Mapping[str, int], sequence: Sequence[int], memory: int
) -> list[dict[str, list[str]]]:
    """Groups of layers to measure together, each `leader -> the layers that share its input`.

    Args:
        layers: what is given the inputs, by name.
        widths: K of each.
        sequence: token ids that show who shares, by the first of them.
        memory: bytes that the moments of a group may take.
    """
    shared: dict[str, list[str]] = {}
    seen: list[tuple[str, Tensor]] = []

    def see(name: str, x: Tensor) -> None:
        leader = next((leader for leader, input_ in seen if input_ is x), name)
        seen.append((leader, x))
        shared.setdefault(leader, []).append(name)

    _read(base, layers, *pad(base, [sequence[:_PROBED_TOKENS]], "right"), see)
    reached = {name for names in shared.values() for name in names}
    shared |= {name: [name] for name in layers if name not in reached}  # experts of other tokens
    groups: list[dict[str, list[str]]] = [{}]
    used = 0
    for leader, names in shared.items():
        size = _BYTES * widths[leader] ** 2
        if groups[-1] and used + size > memory:
            groups.append({})
            used = 0
        groups[-1][leader] = names
        used += size
    return groups


def second_moments(
    base: Any,
    layers: Layers,
    widths: Mapping[str, int],
    sequences: Sequence[Sequence[int]],
    batch_size: int,
) -> dict[str, Tensor]:
    """Layer -> `E x xᵀ [K, K]` over the tokens of a text, float32; zero where no token came.

    Args:
        base: the frozen base model, as `frozen_base` lends it.
    """
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(layers, 0)
    for batch in batches(sequences, batch_size, None):
        input_ids, attention_mask = pad(base, [sequences[i] for i in batch], "right")
        here = attention_mask.bool()

        def add(name: str, x: Tensor, here: Tensor = here) -> None:
            # Experts are given tokens without their places, padding among them.
            rows = x[here.to(x.device)] if x.shape[:-1] == here.shape else x.flatten(0, -2)
            rows = rows.float()
            sums[name] = torch.addmm(sums[name], rows.mT, rows) if name in sums else rows.mT @ rows
            tokens[name] += len(rows)

        _read(base, layers, input_ids, attention_mask, add)
    return {
        name: sums[name] / max(1, tokens[name])
        if name in sums
        else torch.zeros(widths[name], widths[name], device=next(layers[name].parameters()).device)
        for name in layers
    }


def _read(
    base: Any,
    layers: Layers,
    input_ids: Tensor,
    attention_mask: Tensor,
    see: Callable[[str, Tensor], None],
) -> None:
    """One forward pass, in which `see` is shown the input `[..., K]` of each layer."""

    def hook(name: str) -> Any:
        return lambda _layer, inputs: see(name, inputs[0])

    # Without the head there are no logits, which are the largest tensor.
    body = base if base.get_output_embeddings() in layers.values() else base.base_model
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
