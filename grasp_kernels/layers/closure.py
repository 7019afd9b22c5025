"""How much of an adapter lies along a subspace, and its removal from a finished adapter.

Shapes: K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp_kernels.adapters import load_adapter
from grasp_kernels.adapters.files import INDEX, WEIGHTS, find_weights, open_weights
from grasp_kernels.adapters.model_weights import check_merged, model_weights
from grasp_kernels.files import whole_folder
from grasp_kernels.ops.projection import project_columns, project_rows
from grasp_kernels.processes import gathered, refuse_away, whole
from grasp_kernels.sites import adapted_name, base_name
from grasp_kernels.subspace import Subspace

_COPIED = (".json", ".md", ".jinja")  # an adapter folder's configuration, card, tokenizer


class Leakage(NamedTuple):
    """Shares of `ΔW` in one layer, 0 to 1; None where the layer has no such basis."""

    read: float | None  # ‖ΔW U‖ / ‖ΔW‖
    write: float | None  # ‖Vᵀ ΔW‖ / ‖ΔW‖, where V has the gain of a norm after the writer in it


def leakage(
    source: nn.Module | str | PathLike[str],
    subspace: Subspace | None = None,
    *,
    base: nn.Module | str | PathLike[str] | None = None,
) -> dict[str, Leakage]:
    """The leakage of every LoRA layer that has a basis, by module name in the base model.

    With `base` that of a model whose weights were changed: merged, or fully fine-tuned. `ΔW` is
    then the difference of the weights, and what their dtype rounded is in it: a closed adapter that
    is merged into bfloat16 leaks up to `2⁻⁹ ‖W‖ / ‖ΔW‖`.

    Args:
        source: a model with LoRA layers (its first active adapter counts), or an adapter folder;
            with `base` a model, or its checkpoint folder. Of a model that is sharded over
            processes, all of them must ask.
        subspace: whose bases to measure along; by default those of the model's GraspLoRALinear
            layers.
        base: the model that `source` was made from, or its checkpoint folder.

    Raises:
        FileNotFoundError: a folder without safetensors.
        ValueError: no bases to measure along, a subspace of another model, or with `base` an
            adapter that is not merged or a quantised weight.
    """
    if base is not None:
        return _difference_leakage(source, base, subspace)
    if isinstance(source, nn.Module):
        with gathered(source):
            return _leakages(_model_layers(source, subspace))
    if subspace is None:
        raise ValueError("an adapter folder has no bases of its own; pass the subspace to measure.")
    return _leakages(
        (
            layer.site.name,
            layer.lora_A,
            layer.lora_B,
            subspace.read.get(layer.site.name),
            subspace.write.get(layer.site.name),
        )
        for layer in load_adapter(source).layers
    )


_Layer = tuple[str, Tensor, Tensor, Tensor | None, Tensor | None]  # name, A, B, U, V


def _leakages(layers: Iterable[_Layer]) -> dict[str, Leakage]:
    found = {
        name: _layer_leakage(name, A, B, U, V)
        for name, A, B, U, V in layers
        if U is not None or V is not None
    }
    if not found:
        raise ValueError(
            "no LoRA layer has a basis to measure along; pass a subspace that covers these layers."
        )
    return found


def _model_layers(model: nn.Module, subspace: Subspace | None) -> Iterator[_Layer]:
    """Every adapted layer; of experts A and B are stacks."""
    for name, module in model.named_modules():
        lora_A = getattr(module, "lora_A", None)
        if not isinstance(lora_A, nn.ModuleDict) or not lora_A:
            continue
        layer: Any = module
        adapted = adapted_name(name, layer)
        active = [a for a in layer.active_adapters if a in lora_A] or list(lora_A)
        if subspace is None:
            U, V = getattr(layer, "read_basis", None), getattr(layer, "write_basis", None)
        else:
            U, V = subspace.read.get(adapted), subspace.write.get(adapted)
        refuse_away(f"lora_A of {adapted!r}", layer.lora_A[active[0]].weight)
        with getattr(layer, "computing_closed", nullcontext)():
            A, B = _factors(layer, active[0])
        yield adapted, A, B, U, V


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """`A[R, K]`, `B[N, R]`; of E experts, which peft stores flat, `A[E, R, K]`, `B[E, N, R]`."""
    A, B = whole(layer.lora_A[adapter].weight), whole(layer.lora_B[adapter].weight)
    if not hasattr(layer, "parameter_name"):
        return A, B
    E = layer.num_experts
    return A.reshape(E, -1, A.shape[1]), B.reshape(B.shape[0], -1, E).permute(2, 0, 1)


@torch.no_grad()
def _layer_leakage(name: str, A: Tensor, B: Tensor, U: Tensor | None, V: Tensor | None) -> Leakage:
    A, B = A.double(), B.double()
    _check_bases(name, U, V, A.shape[-1], B.shape[-2])
    total = _product_norm(B, A)
    if total == 0.0:
        return Leakage(None if U is None else 0.0, None if V is None else 0.0)
    return Leakage(
        None if U is None else _product_norm(B, A @ U.to(A)) / total,
        None if V is None else _product_norm(V.to(B).mT @ B, A) / total,
    )


def _check_bases(name: str, U: Tensor | None, V: Tensor | None, K: int, N: int) -> None:
    for role, basis, width in (("read", U, K), ("write", V, N)):
        if basis is not None and basis.shape[0] != width:
            raise ValueError(
                f"the {role} basis for {name!r} has {basis.shape[0]} rows but the layer has "
                f"{width} features; the subspace belongs to another model."
            )


def _product_norm(B: Tensor, A: Tensor) -> float:
    """`‖B A‖`, of stacks over all, from the R×R Gram matrices, without forming the product."""
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0.0).sqrt())


@torch.no_grad()
def _difference_leakage(
    source: nn.Module | str | PathLike[str],
    base: nn.Module | str | PathLike[str],
    subspace: Subspace | None,
) -> dict[str, Leakage]:
    """Leakage of the difference of two models, one weight `[N, K]` of each in memory at a time."""
    if subspace is None or subspace.is_empty:
        raise ValueError("weights have no bases of their own; pass the subspace to measure along.")
    check_merged(source, True)
    check_merged(base, False)
    changed, original = model_weights(source), model_weights(base)
    found = {}
    for name in dict.fromkeys([*subspace.write, *subspace.read]):
        if name not in changed and name not in original:
            continue  # where others write, such as a mixture of experts, or not in this block
        for weights, role in ((changed, "model"), (original, "base")):
            if name not in weights:
                raise ValueError(
                    f"the {role} has no weight of {name!r}, for which the subspace has a basis; "
                    "the subspace belongs to another model."
                )
        W = original[name]()
        if W.ndim > 1:  # of a norm after a writer the output is in the stream, no weight
            bases = subspace.read.get(name), subspace.write.get(name)
            found[name] = _delta_leakage(name, W, changed[name](), *bases)
    if not found:
        raise ValueError(
            "neither model has weights for the bases of the subspace; it belongs to another model."
        )
    return found


def _delta_leakage(
    name: str, W: Tensor, changed: Tensor, U: Tensor | None, V: Tensor | None
) -> Leakage:
    if W.shape != changed.shape or not (W.is_floating_point() and changed.is_floating_point()):
        raise ValueError(
            f"the weights of {name!r} are {W.dtype} {tuple(W.shape)} and {changed.dtype} "
            f"{tuple(changed.shape)}; compare weights of one shape that are not quantised."
        )
    delta = changed.to(W.device, torch.float32) - W.float()
    _check_bases(name, U, V, delta.shape[-1], delta.shape[-2])
    total = float(delta.norm()) or 1.0  # without a difference nothing leaks
    return Leakage(
        None if U is None else float((delta @ U.to(delta)).norm()) / total,
        None if V is None else float((V.to(delta).mT @ delta).norm()) / total,
    )


def project_adapter(
    adapter_dir: str | PathLike[str], subspace: Subspace, out: str | PathLike[str]
) -> None:
    """Remove a subspace from a finished adapter: `A (I − U Uᵀ)`, `(I − V Vᵀ) B`.

    A baseline and a quick remedy, not GRASP: the retrain with projected gradients is what lets the
    rest of the adapter learn the task without the factor. `out` is a new adapter folder in peft's
    format, with the dtypes of the old one.

    Raises:
        FileExistsError: `out` exists.
        ValueError: the subspace is empty, or covers no layer of the adapter.
    """
    from safetensors.torch import save_file

    source, target = Path(adapter_dir), Path(out)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} exists; choose a new folder for the adapter.")
    if subspace.is_empty:
        raise ValueError("the subspace is empty, there is nothing to project out of the adapter.")
    leakage(source, subspace)  # checks the adapter, and that the two fit
    weights = find_weights(source, None)
    with open_weights(weights) as tensors:
        projected = _projected(tensors, subspace)
    with whole_folder(target) as folder:
        for file in weights.parent.iterdir():
            if file.suffix in _COPIED and file.is_file() and file.name != INDEX:
                shutil.copy2(file, folder / file.name)
        save_file(projected, folder / WEIGHTS, metadata={"format": "pt"})


def _projected(
    tensors: Mapping[str, Callable[[], Tensor]], subspace: Subspace
) -> dict[str, Tensor]:
    found = {}
    for key, read in tensors.items():
        tensor = read()
        name, _, factor = base_name(key).rpartition(".lora_")
        projected = tensor
        if factor.startswith("A"):
            projected = project_rows(tensor, subspace.read.get(name))
        elif factor.startswith("B"):
            projected = project_columns(tensor, subspace.write.get(name))
        found[key] = projected.to(tensor.dtype).contiguous()
    return found
