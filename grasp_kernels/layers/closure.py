"""How much of an adapter lies along a subspace, and its removal from a finished adapter.

Shapes: K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from grasp_kernels.adapters.files import (
    INDEX,
    WEIGHTS,
    Parts,
    config_model_type,
    find_weights,
    open_weights,
    refuse_other_forms,
    sort_keys,
)
from grasp_kernels.adapters.load import adapter_parts
from grasp_kernels.files import inside, whole_folder
from grasp_kernels.inert import listed, shown
from grasp_kernels.models.architectures import site_rules
from grasp_kernels.models.names import adapted_name, expert_part
from grasp_kernels.models.sharding import gathered
from grasp_kernels.models.weights import (
    check_merged,
    compared,
    model_type_of,
    model_weights,
)
from grasp_kernels.ops.projection import project_columns
from grasp_kernels.subspace import Subspace, check_subspace

_COPIED = (".json", ".md", ".jinja")  # an adapter folder's configuration, card, tokenizer


class Leakages(dict[str, float]):
    """`‖Vᵀ ΔW‖ / ‖ΔW‖`, 0 to 1, of every layer that has a basis, by module name in the base model.

    The gain of a norm after the layer is in `V`.

    Attributes:
        unseen: what belongs to the change and was not measured, by name: weights that the subspace
            has no basis for though it should, trained embeddings, norms and biases of the base.
            Of those nothing is known.
        changed: whether any of the layers that were measured is another one than in the base.
    """

    unseen: tuple[str, ...] = ()
    changed: bool = False


def leakage(
    source: nn.Module | str | PathLike[str],
    subspace: Subspace | None = None,
    *,
    base: nn.Module | str | PathLike[str] | None = None,
    adapter_name: str | None = None,
) -> Leakages:
    """The leakage of every LoRA layer that has a basis, by module name in the base model.

    With `base` that of a model whose weights were changed: merged, or fully fine-tuned. `ΔW` is
    then the difference of the weights, and what their dtype rounded is in it: a closed adapter that
    is merged into bfloat16 leaks up to `2⁻⁹ ‖W‖ / ‖ΔW‖`.

    What a bias adds to the stream counts by itself: the leakage of a layer is the larger of that of
    its weight and that of its bias. Nothing is left out in silence: see `Leakages.unseen`, of which
    a warning tells too.

    Args:
        source: a model with LoRA layers, or an adapter folder; with `base` a model, or its
            checkpoint folder. Of a model that is sharded over processes, all of them must ask.
        subspace: whose bases to measure along; by default those of the model's GraspLoRALinear
            layers.
        base: the model that `source` was made from, or its checkpoint folder.
        adapter_name: which adapter, where there are several: of a model the active one by default.

    Raises:
        FileNotFoundError: a folder without safetensors.
        ValueError: no bases to measure along, a subspace of another model, values that are not
            finite, two active adapters, or with `base` an adapter that is not merged or a quantised
            weight.
    """
    check_subspace(subspace)
    found = _leakage(source, subspace, base, adapter_name)
    if found.unseen:
        warnings.warn(
            f"The leakage of {listed(found.unseen)} was not measured; see Leakages.unseen.",
            stacklevel=2,
        )
    return found


def _leakage(
    source: nn.Module | str | PathLike[str],
    subspace: Subspace | None,
    base: nn.Module | str | PathLike[str] | None = None,
    adapter_name: str | None = None,
) -> Leakages:
    if base is not None:
        return _of_models(source, base, subspace)
    if subspace is None and not isinstance(source, nn.Module):
        raise ValueError("an adapter folder has no bases of its own; pass the subspace to measure.")
    with gathered(source) if isinstance(source, nn.Module) else nullcontext():
        parts = adapter_parts(source, adapter_name)
    refuse_other_forms(parts.source, parts.config)
    if subspace is None:
        assert isinstance(source, nn.Module)
        return _of_adapter(parts, _Bases.of_layers(source))
    known = isinstance(source, nn.Module) and model_type_of(source)
    names = [entry.name for entry in parts.factors]
    kind = known or config_model_type(parts.config)
    return _of_adapter(parts, _Bases.of_subspace(subspace, kind, names))


class _Bases:
    """The basis of every module, and which modules have none with good reason."""

    def __init__(self, known: Mapping[str, Tensor], without: Callable[[str], bool]) -> None:
        self.known, self._without = known, without

    @classmethod
    def of_subspace(
        cls, subspace: Subspace, model_type: str | None, names: Iterable[str]
    ) -> _Bases:
        """Those of a subspace, which says nothing of layers that read the stream."""
        try:
            rules = site_rules(model_type or subspace.metadata.get("model_type"), names)
        except ValueError:
            return cls(subspace.bases, lambda name: False)

        def without(name: str) -> bool:
            site = rules.site(name) or rules.site(f"{name}.weight")
            return site is not None and site.role == "read"

        return cls(subspace.bases, without)

    @classmethod
    def of_layers(cls, model: nn.Module) -> _Bases:
        """Those that replaced layers have; one that was given none needs none."""
        known: dict[str, Tensor] = {}
        replaced = set()
        for name, layer in model.named_modules():
            if hasattr(layer, "write_basis") and hasattr(layer, "lora_A"):
                name = adapted_name(name, layer)
                replaced.add(name)
                if layer.write_basis is not None:
                    known[name] = layer.write_basis
        return cls(known, replaced.__contains__)

    def at(self, name: str) -> str | None:
        """Under which name a module has its basis; one of an expert has that of all experts."""
        part = expert_part(name)
        names = (name, f"{name}.weight", part.whole if part else name)
        return next((one for one in names if one in self.known), None)

    def unseen(self, name: str) -> bool:
        """Whether nothing is known of a weight that has no basis of its own, though it counts."""
        module = name.removesuffix(".bias")
        return self.at(module) is not None or not self._without(module)


class _Measured:
    """Norms of all parts of one site's change, and of what of them lies along its basis."""

    def __init__(self, name: str, basis: Tensor) -> None:
        self.name, self.basis = name, basis
        self.total = self.along = self.bias = 0.0

    def add_product(self, A: Tensor, B: Tensor, scaling: float) -> None:
        """`s B A`, or a stack of those."""
        A, B = A.double(), B.double() * scaling
        self._check_width(B.shape[-2])
        self._add(_product_norm(B, A), _product_norm(self.basis.to(B).mT @ B, A))

    def add_delta(self, changed: Tensor, original: Tensor) -> None:
        """`ΔW[N, K]`, or a stack of those."""
        if changed.shape != original.shape:
            raise ValueError(
                f"the weights of {shown(self.name)} are {changed.dtype} {tuple(changed.shape)} and "
                f"{original.dtype} {tuple(original.shape)}; compare weights of one shape that are "
                "not quantised."
            )
        delta = changed.float() - original.float()
        self._check_width(delta.shape[-2])
        size = float(delta.abs().max())
        if size == 0.0:
            return
        delta /= size  # whose squares float32 holds
        along = self.basis.to(delta).mT @ delta
        self._add(size * float(delta.norm()), size * float(along.norm()))

    def add_bias(self, bias: Tensor) -> None:
        """`Δb[N]`, which the layer adds whatever it reads."""
        if bool(bias.any()):
            b = bias.double()
            self.bias = max(self.bias, float((self.basis.to(b).mT @ b).norm() / b.norm()))

    def leakage(self) -> float:
        return max(self.along / (self.total or 1.0), self.bias)  # without a change nothing leaks

    def _add(self, total: float, along: float) -> None:
        if not math.isfinite(total):
            raise ValueError(
                f"the change of {shown(self.name)} is larger than numbers can be; give an earlier "
                "checkpoint, before training diverged."
            )
        self.total, self.along = math.hypot(self.total, total), math.hypot(self.along, along)

    def _check_width(self, N: int) -> None:
        if self.basis.shape[0] != N:
            raise ValueError(
                f"the basis for {shown(self.name)} has {self.basis.shape[0]} rows but the layer "
                f"has {N} features; the subspace belongs to another model."
            )


@torch.no_grad()
def _of_adapter(parts: Parts, bases: _Bases) -> Leakages:
    measured: dict[str, _Measured] = {}
    unseen = [name for name in parts.others if bases.unseen(name)]
    for entry in parts.factors:
        name = bases.at(entry.name)
        if name is None:
            unseen += [entry.name] if bases.unseen(entry.name) else []
            continue
        site = measured.setdefault(name, _Measured(name, bases.known[name]))
        site.add_product(entry.lora_A, entry.lora_B, entry.scaling)
        if entry.bias is not None:
            site.add_bias(entry.bias)
    if not measured:
        raise ValueError(
            "no LoRA layer has a basis to measure along; pass a subspace that covers these layers."
        )
    return _leakages(measured, unseen)


def _leakages(measured: dict[str, _Measured], unseen: list[str]) -> Leakages:
    found = Leakages({name: site.leakage() for name, site in measured.items()})
    found.unseen = tuple(dict.fromkeys(unseen))
    found.changed = any(site.total or site.bias for site in measured.values())
    return found


def _product_norm(B: Tensor, A: Tensor) -> float:
    """`‖B A‖`, of stacks over all, from the R×R Gram matrices, without forming the product."""
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0.0).sqrt())


@torch.no_grad()
def _of_models(
    source: nn.Module | str | PathLike[str],
    base: nn.Module | str | PathLike[str],
    subspace: Subspace | None,
) -> Leakages:
    """Leakage of the difference of two models, of which every tensor is looked at."""
    if subspace is None or subspace.is_empty:
        raise ValueError("weights have no bases of their own; pass the subspace to measure along.")
    check_merged(source, True)
    check_merged(base, False)
    changed, original = model_weights(source), model_weights(base)
    bases = _Bases.of_subspace(subspace, model_type_of(base), original)
    measured: dict[str, _Measured] = {}
    unseen = []
    for name, one, other, same in compared(changed, original):
        place = bases.at(name)
        writer = bases.at(name.removesuffix(".bias")) if name.endswith(".bias") else None
        if place is not None and (one is None or other is None):
            raise ValueError(
                f"the {'model' if one is None else 'base'} has no weight of {shown(name)}, for "
                "which the subspace has a basis; the subspace belongs to another model."
            )
        if place is not None and one is not None and other is not None and one.ndim > 1:
            site = measured.setdefault(place, _Measured(place, bases.known[place]))
            site.add_delta(one, other)
        elif same:
            continue
        elif writer is not None and one is not None and other is not None:
            site = measured.setdefault(writer, _Measured(writer, bases.known[writer]))
            site.add_bias(one - other)
        elif bases.unseen(name):
            unseen.append(name)
    if not measured:
        raise ValueError(
            "neither model has weights for the bases of the subspace; it belongs to another model."
        )
    return _leakages(measured, unseen)


def project_adapter(
    adapter_dir: str | PathLike[str], subspace: Subspace, out: str | PathLike[str]
) -> tuple[str, ...]:
    """Remove a subspace from a finished adapter: `(I − V Vᵀ) B`.

    A baseline and a quick remedy, not GRASP: the retrain with projected gradients is what lets the
    rest of the adapter learn the task without the factor. `out` is a new adapter folder in peft's
    format, with the dtypes of the old one.

    Returns:
        The names of what could not be projected and is as it was, see `Leakages.unseen`.

    Raises:
        FileExistsError: `out` exists.
        ValueError: the subspace is empty, or covers no layer of the adapter; a file to copy is a
            link that leads out of the folder.
    """
    from safetensors.torch import save_file

    check_subspace(subspace)
    source, target = Path(adapter_dir), Path(out)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} exists; choose a new folder for the adapter.")
    if subspace.is_empty:
        raise ValueError("the subspace is empty, there is nothing to project out of the adapter.")
    left = _leakage(source, subspace).unseen  # checks the adapter, and that the two fit
    weights = find_weights(source, None)
    copied = [
        inside(file)
        for file in sorted(weights.parent.iterdir())
        if file.suffix in _COPIED and file.is_file() and file.name != INDEX
    ]
    projected = _projected(weights, subspace)
    with whole_folder(target) as folder:
        for file in copied:
            shutil.copy2(file, folder / file.name)
        save_file(projected, folder / WEIGHTS, metadata={"format": "pt"})
    return left


def _projected(weights: Path, subspace: Subspace) -> dict[str, Tensor]:
    tensors = open_weights(weights)
    found = {key: read() for key, read in tensors.items()}
    bases = _Bases(subspace.bases, lambda name: False)
    for name, keys in sort_keys(weights, tensors, None)[0].items():
        basis = subspace.bases.get(bases.at(name) or name)
        for part, key in keys.items():
            if part == "A" or basis is None:
                continue
            tensor = found[key]
            wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 multiplies not
            found[key] = project_columns(wide, basis).to(tensor.dtype).contiguous()
    return found
