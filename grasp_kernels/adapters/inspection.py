"""An adapter for human eyes: a table of its layers, and one figure.

Shapes: `R` LoRA rank, `K` inputs and `N` outputs of a linear layer.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from grasp_kernels.adapters.load import Adapter, LoRAWeights
from grasp_kernels.files import open_tensors, whole_file
from grasp_kernels.inert import inert, printable

_SHOWN = 4


def is_subspace(path: str | PathLike[str]) -> bool:
    """Whether a file is one that `Subspace.save` wrote; adapters are folders or other files.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a safetensors file that is not whole.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no {path}: give an adapter folder or a subspace file.")
    if Path(path).is_dir():
        return False
    try:
        with open_tensors(path, "give a file that is whole") as file:
            return any(key.startswith("grasp_kernels") for key in file.metadata() or {})
    except ValueError:
        if Path(path).suffix == ".safetensors":
            raise
        return False  # a pickle, or an index of shards


def singular_values(layer: LoRAWeights) -> Tensor:
    """All `R` singular values of `ΔW[N,K]`, float64, from the triangles of both factors."""
    right_b = torch.linalg.qr(layer.lora_B.double().cpu(), mode="r").R
    right_a = torch.linalg.qr(layer.lora_A.double().cpu().mT, mode="r").R
    return layer.scaling * torch.linalg.svdvals(right_b @ right_a.mT)


def adapter_table(adapter: Adapter) -> str:
    """One line for each adapted site, and the notes on what was left out."""
    names = [printable(layer.site.name) for layer in adapter.layers]
    width = max(map(len, names))
    lines = [
        f"{printable(adapter.source)}: {len(adapter.layers)} modules, base model "
        f"{inert(str(adapter.base_model))}",
        f"{'module':<{width}}  role   rank  scaling     ‖ΔW‖  leading singular values",
    ]
    for name, layer in zip(names, adapter.layers, strict=True):
        values = singular_values(layer)
        leading = "  ".join(f"{value:.4f}" for value in values[:_SHOWN].tolist())
        lines.append(
            f"{name:<{width}}  {layer.site.role:<5}  {len(layer.lora_A):>4}  "
            f"{layer.scaling:>7.3g}  {values.norm().item():>7.4f}  {leading}"
        )
    blocks = {layer.site.layer for layer in adapter.layers}
    if len(blocks) == 1:
        lines.append("It adapts one block, which has nothing to agree with: identify it with k=1.")
    return "\n".join([*lines, *map(inert, adapter.notes)])


def plot_adapter(adapter: Adapter, path: str | PathLike[str]) -> None:
    """Save a PNG: the leading singular value of every module, by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, list[tuple[int, float]]] = {}
    for layer in adapter.layers:
        kind = layer.site.name.rsplit(".", 1)[-1]
        point = (layer.site.layer, singular_values(layer)[0].item())
        kinds.setdefault(f"{kind} ({layer.site.role})", []).append(point)
    for kind, points in kinds.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind)
    axes.set(xlabel="layer", ylabel="leading singular value of ΔW", ylim=(0, None))
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
