"""The share of an adapter along a subspace, and its removal from a finished adapter.

Shapes: K in, N out, R LoRA rank, Q basis size.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from grasp_kernels.adapters.files import (
    WEIGHTS,
    Parts,
    changed_copy,
    config_model_type,
    find_weights,
    open_weights,
    refuse_other_forms,
)
from grasp_kernels.adapters.load import CONVERT, adapter_parts, moved_base
from grasp_kernels.inert import listed, shown
from grasp_kernels.models.architectures import SiteRules, model_gains, site_rules
from grasp_kernels.models.difference import compared, whole_model
from grasp_kernels.models.names import adapted_name
from grasp_kernels.models.sharding import gathered
from grasp_kernels.models.weights import Source, model_type_of
from grasp_kernels.ops.projection import project_columns
from grasp_kernels.subspace import Subspace, check_subspace

# The basis of a module's output with the name of its site; None for a module that writes nothing to
# the stream, and "" in place of an unknown name.
_Bases = Callable[[str], tuple[str, Tensor | None]]


class Leakages(dict[str, float]):
    """Leakage `‖Vᵀ ΔW‖ / ‖ΔW‖`, 0 to 1, of every writer to the residual stream.

    Names are those of the base model. The gain of a norm after the layer is in `V`.

    Attributes:
        unseen: names of the changes that were not measured: layers outside of the decoder blocks,
            layers before a norm of unknown gain, and trained embeddings, norms and biases of the
            base. Their leakage is unknown.
        changed: whether any measured layer is trained.
    """

    unseen: tuple[str, ...] = ()
    changed: bool = False


def leakage(
    source: Source,
    subspace: Subspace | None = None,
    *,
    base: Source | None = None,
    adapter_name: str | None = None,
    sites: SiteRules | None = None,
) -> Leakages:
    """Measure the leakage `‖Vᵀ ΔW‖ / ‖ΔW‖`, 0 to 1, of every writer to the residual stream.

    With `base`, `source` is a merged or fully fine-tuned model. `ΔW` is then the difference of the
    weights, with the rounding of their dtype: a closed adapter that is merged into bfloat16 leaks
    up to `2⁻⁹ ‖W‖ / ‖ΔW‖`.

    The leakage of a layer with a bias is that of its weight or that of its bias, whichever is
    larger. `Leakages.unseen` and a warning name all changes that were not measured.

    Args:
        source: a model with LoRA layers, or an adapter folder; with `base` a model, or its
            checkpoint folder. All processes of a sharded model must call this function.
        subspace: the subspace; None: the bases of the model's GraspLoRALinear layers.
        base: the model before the changes, or its checkpoint folder.
        adapter_name: name of the adapter, if there are several; None: the active one of a model.
        sites: the writers, for an unknown architecture.

    Raises:
        FileNotFoundError: a folder without safetensors.
        ValueError: no layer to measure, a subspace of another model, values that are not finite,
            two active adapters, or with `base` an adapter that is not merged or a quantised weight.
    """
    check_subspace(subspace)
    if base is not None:
        found = _of_models(source, base, subspace, sites)
    else:
        with gathered(source) if isinstance(source, nn.Module) else nullcontext():
            parts, bases = _of_adapter(source, subspace, adapter_name, sites)
        found = _measured(parts, bases)
    if found.unseen:
        warnings.warn(
            f"The leakage of {listed(found.unseen)} was not measured; see Leakages.unseen.",
            stacklevel=2,
        )
    return found


def _of_adapter(
    source: Source, subspace: Subspace | None, adapter_name: str | None, sites: SiteRules | None
) -> tuple[Parts, _Bases]:
    """Return an adapter, and the bases of the subspace, or else of its layers, at its modules."""
    model = source if isinstance(source, nn.Module) else None
    if subspace is None and model is None:
        raise ValueError("an adapter folder has no basis of its own; pass the subspace to measure.")
    parts = adapter_parts(source, adapter_name)
    refuse_other_forms(parts.source, parts.config)
    if start := moved_base(parts.config):
        moved = (
            f"{parts.source!r} was initialised with {start!r}, which moved pretrained weights into "
            "it, so B·A is not what it learned"
        )
        if model is None:
            raise ValueError(f"{moved}; {CONVERT}, and use that.")
        warnings.warn(f"{moved}, and its leakage counts both.", stacklevel=3)
    if subspace is None and model is not None:
        known = {  # of replaced layers; one without a basis needs none
            adapted_name(name, layer): layer.write_basis
            for name, layer in model.named_modules()
            if hasattr(layer, "write_basis") and hasattr(layer, "lora_A")
        }
        return parts, lambda name: (name if name in known else "", known.get(name))
    assert subspace is not None
    model_type = None if model is None else model_type_of(model)
    names = [entry.name for entry in parts.factors]
    model_type = model_type or config_model_type(parts.config)
    return parts, _bases_along(subspace, model_type, names, source, sites)


def _bases_along(
    subspace: Subspace,
    model_type: str | None,
    names: Iterable[str],
    source: Source,
    sites: SiteRules | None,
) -> _Bases:
    """Return the bases of a subspace at the writers, with the gains of a loaded model."""
    gains, names = dict(subspace.gains), list(names)
    rules = site_rules(model_type or subspace.metadata.get("model_type"), names, sites)
    found = {name: rules.site(name) for name in names}
    if isinstance(source, nn.Module):
        gains |= model_gains(source, filter(None, found.values()))

    def basis(name: str) -> tuple[str, Tensor | None]:
        site = found[name]
        if site is None:
            return (name if rules.split(name) else ""), None
        if site.norm and site.norm not in gains:
            return "", None
        return site.name, subspace.at(site, gains.get(site.norm or ""))

    return basis


@dataclass
class _Measured:
    """Hold the norms of all parts of one site's change, and of their shares along the basis."""

    name: str
    basis: Tensor
    total: float = 0.0
    along: float = 0.0
    bias: float = 0.0

    def add_product(self, A: Tensor, B: Tensor, scaling: float) -> None:
        """Add `s B A [N, K]`, or a stack of such products."""
        A, B = A.double(), B.double() * scaling
        self._check_width(B.shape[-2])
        self._add(_product_norm(B, A), _product_norm(self.basis.to(B).mT @ B, A))

    def add_delta(self, changed: Tensor, original: Tensor) -> None:
        """Add `ΔW[N, K]`, or a stack of such changes."""
        if changed.shape != original.shape:
            raise ValueError(
                f"the weights of {shown(self.name)} are {changed.dtype} {tuple(changed.shape)} and "
                f"{original.dtype} {tuple(original.shape)}; compare weights of the same shape that "
                "are not quantised."
            )
        delta = changed.float() - original.float()
        self._check_width(delta.shape[-2])
        if size := float(delta.abs().max()):
            delta /= size  # whose squares float32 holds
            along = self.basis.to(delta).mT @ delta
            self._add(size * float(delta.norm()), size * float(along.norm()))

    def _add(self, total: float, along: float) -> None:
        if not math.isfinite(total):
            raise ValueError(
                f"the change of {shown(self.name)} is not finite; give an earlier checkpoint."
            )
        self.total, self.along = math.hypot(self.total, total), math.hypot(self.along, along)

    def _check_width(self, N: int) -> None:
        if self.basis.shape[0] != N:
            raise ValueError(
                f"the basis for {shown(self.name)} has {self.basis.shape[0]} rows but the layer "
                f"has {N} features; give the subspace of this model."
            )

    def add_bias(self, bias: Tensor) -> None:
        """Add `Δb[N]`; a bias counts whatever the input of the layer."""
        if bool(bias.any()):
            b = bias.double()
            self.bias = max(self.bias, float((self.basis.to(b).mT @ b).norm() / b.norm()))

    def leakage(self) -> float:
        return max(self.along / (self.total or 1.0), self.bias)  # without a change nothing leaks


@torch.no_grad()
def _measured(parts: Parts, bases: _Bases) -> Leakages:
    measured: dict[str, _Measured] = {}
    unseen = list(parts.others)
    for entry in parts.factors:
        name, basis = bases(entry.name)
        if basis is None:
            unseen += [] if name else [entry.name]
            continue
        site = measured.setdefault(name, _Measured(name, basis))
        site.add_product(entry.lora_A, entry.lora_B, entry.scaling)
        if entry.bias is not None:
            site.add_bias(entry.bias)
    if not measured:
        raise ValueError(
            "no LoRA layer that writes to the residual stream has a basis to measure along; pass a "
            "subspace of this model, with the gains of the norms after its writers if it has some."
        )
    return _leakages(measured, unseen)


@torch.no_grad()
def _of_models(
    source: Source, base: Source, subspace: Subspace | None, sites: SiteRules | None
) -> Leakages:
    """Measure the difference of two models in every tensor."""
    if subspace is None:
        raise ValueError("a merged model has no basis of its own; pass the subspace to measure.")
    changed, original = whole_model(source, merged=True), whole_model(base, merged=False)
    modules = {name: name.removesuffix(".bias") for name in (*original, *changed)}
    bases = _bases_along(subspace, model_type_of(base), set(modules.values()), base, sites)
    measured: dict[str, _Measured] = {}
    unseen: list[str] = []
    for name, one, other in compared(changed, original):
        place, basis = bases(modules[name])
        if basis is not None and (one is None or other is None):
            raise ValueError(
                f"the {'model' if one is None else 'base'} has no weight {shown(name)}, which "
                "writes to the residual stream; give two models of the same architecture."
            )
        if basis is not None and one is not None and other is not None and one.ndim > 1:
            measured.setdefault(place, _Measured(place, basis)).add_delta(one, other)
        elif one is other:
            continue
        elif basis is not None and name != modules[name] and one is not None and other is not None:
            measured.setdefault(place, _Measured(place, basis)).add_bias(one - other)
        elif basis is not None or not place:
            unseen.append(name)
    if not measured:
        raise ValueError(
            "neither model has a weight that writes to the residual stream of the subspace; give a "
            "subspace of these models."
        )
    return _leakages(measured, unseen)


def _leakages(measured: dict[str, _Measured], unseen: Iterable[str]) -> Leakages:
    found = Leakages({name: site.leakage() for name, site in measured.items()})
    found.unseen = tuple(dict.fromkeys(unseen))
    found.changed = any(site.total or site.bias for site in measured.values())
    return found


def _product_norm(B: Tensor, A: Tensor) -> float:
    """Return `‖B A‖`, of stacks over all, from the R×R Gram matrices without the product."""
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0.0).sqrt())


def project_adapter(
    adapter_dir: str | PathLike[str],
    subspace: Subspace,
    out: str | PathLike[str],
    *,
    sites: SiteRules | None = None,
) -> tuple[str, ...]:
    """Remove a subspace from a finished adapter: `(I − V Vᵀ) B`.

    This is weaker than retraining, in which the rest of the adapter can learn the task without the
    subspace. `out` is a new adapter folder in peft's format, with the dtypes of the old one.

    Returns:
        The names of the changes that were left as they were, see `Leakages.unseen`.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: no adapter in `adapter_dir`.
        ValueError: no layer of the adapter writes to the residual stream; a subspace of another
            model; a file to copy is a link to a place outside of the folder.
    """
    from safetensors.torch import save_file

    check_subspace(subspace)
    source = Path(adapter_dir)
    with changed_copy(source, out) as folder:
        parts, bases = _of_adapter(source, subspace, None, sites)
        left = _measured(parts, bases).unseen  # checks that they fit
        tensors = {key: read() for key, read in open_weights(find_weights(source, None)).items()}
        for entry in parts.factors:
            for key in entry.keys[1:]:
                tensor = tensors[key]
                # float8 has no product.
                wide = tensor.float() if tensor.element_size() == 1 else tensor
                _, basis = bases(entry.name)
                tensors[key] = project_columns(wide, basis).to(tensor.dtype).contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return left
