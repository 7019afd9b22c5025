"""An adapter for human eyes: a table of its layers.

Shapes: `R` LoRA rank, `K` inputs and `N` outputs of a linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grasp_kernels.adapters.load import Adapter, LoRAWeights
from grasp_kernels.inert import inert, printable

_SHOWN = 4


def singular_values(layer: LoRAWeights) -> Tensor:
    """Return all `R` singular values of `ΔW[N,K]`, float64, from the factors' triangles."""
    right_b = torch.linalg.qr(layer.lora_B.double().cpu(), mode="r").R
    right_a = torch.linalg.qr(layer.lora_A.double().cpu().mT, mode="r").R
    return layer.scaling * torch.linalg.svdvals(right_b @ right_a.mT)


def adapter_table(adapter: Adapter) -> str:
    """Return a line for each adapted layer, and the notes of the adapter."""
    names = [inert(layer.name) for layer in adapter.layers]
    width = max(map(len, names))
    lines = [
        f"{printable(adapter.source)}: {len(adapter.layers)} modules, base model "
        f"{inert(str(adapter.base_model))}",
        f"{'module':<{width}}  writes  rank  scaling     ‖ΔW‖  leading singular values",
    ]
    for name, layer in zip(names, adapter.layers, strict=True):
        values = singular_values(layer)
        leading = "  ".join(f"{value:.4f}" for value in values[:_SHOWN].tolist())
        lines.append(
            f"{name:<{width}}  {'yes' if layer.site else '':<6}  {len(layer.lora_A):>4}  "
            f"{layer.scaling:>7.3g}  {values.norm().item():>7.4f}  {leading}"
        )
    return "\n".join([*lines, *map(inert, adapter.notes)])
