"""Put a peft model on GraspLoRALinear, and back.

Shapes: K in, N out, P read basis size, Q write basis size, D residual width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from grasp_kernels.layers.factors import ClosedFactors
from grasp_kernels.layers.linear import GraspLoRALinear, why_never
from grasp_kernels.ops import backends, project_gradient
from grasp_kernels.ops.lora_linear.api import PROJECTIONS
from grasp_kernels.processes import by_fsdp2, refuse_away, refuse_tensor_parallel
from grasp_kernels.sites import Site, SiteRules, base_name, model_sites
from grasp_kernels.subspace import Subspace

_HOOKS = "_grasp_writer_hooks"


@dataclass
class Replacement:
    """What `replace_lora_layers` did; names are those of the base model."""

    replaced: list[str] = field(default_factory=list)
    write_projected: list[str] = field(default_factory=list)
    read_projected: list[str] = field(default_factory=list)
    hooked_writers: list[str] = field(default_factory=list)  # no adapter: only dY is projected
    bare_writers: list[str] = field(default_factory=list)  # the subspace has no basis for them
    fallbacks: dict[str, str] = field(default_factory=dict)  # name -> why it stays with peft

    def __str__(self) -> str:
        rows = [
            ("layers on GraspLoRALinear", len(self.replaced)),
            ("  with a write basis", len(self.write_projected)),
            ("  with a read basis", len(self.read_projected)),
            ("writers without an adapter, gradient projected", len(self.hooked_writers)),
            ("writers that the subspace does not cover", len(self.bare_writers)),
            ("layers that stay with peft", len(self.fallbacks)),
        ]
        width = max(len(title) for title, _ in rows)
        lines = [f"{title:<{width}}  {count:>4}" for title, count in rows]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.fallbacks.items()])


def replace_lora_layers(
    model: nn.Module,
    subspace: Subspace | None = None,
    *,
    project: str = "residual",
    closed: bool = True,
    backend: str = "auto",
    pad_weights: bool = False,
    sites: SiteRules | None = None,
) -> Replacement:
    """Swap the LoRA layers of a peft model in place; parameters and their names stay.

    Without a subspace the layers are only faster. With one, every writer that it covers gets its
    write basis, adapted or not, and every adapted reader its read basis. The gradient of a writer
    without an adapter of its own is projected too (`project="residual"`), so that nothing upstream
    learns through it. Calling it again starts afresh.

    Args:
        model: a `PeftModel`, or any module with peft's LoRA layers in it.
        subspace: from `identify`, `identify_self_contrast` or a file; None or empty projects
            nothing.
        project, closed, backend: see `lora_linear`.
        pad_weights: lay the frozen weights out with a few spare columns and rows, so that wide
            products (70B sizes) can carry the adapter inside the library's product; for kernels.
            `restore_lora_layers` makes the weights contiguous again. Not for FSDP, which lays the
            weights out itself.
        sites: writers and readers of an architecture that is not known.

    Raises:
        ValueError: no LoRA layers, a subspace of another model (the site or the shape is named), an
            unknown option, an architecture whose writers are not known, or a subspace for weights
            that tensor parallelism, ZeRO-3 of DeepSpeed or FSDP has taken apart (FSDP2 may).
    """
    _check_options(project, backend)
    layers = {
        base_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    if not layers:
        raise ValueError(
            "the model has no LoRA layers; wrap it with peft.get_peft_model before replacing them."
        )
    report = Replacement()
    write: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    if subspace is not None and not subspace.is_empty:
        known = model_sites(model, sites)
        write, read = _bases(model, subspace, known)
        writers = [site.name for site in known if site.role == "write"]
        report.bare_writers = [name for name in writers if write and name not in write]
    restore_lora_layers(model)

    factors = ClosedFactors()
    sharded = by_fsdp2(model)
    if sharded and pad_weights:
        raise ValueError(
            "pad_weights=True cannot lay out weights that FSDP2 has sharded; leave it out."
        )
    for name, layer in layers.items():
        if name in write or name in read:
            weight = layer.get_base_layer().weight
            refuse_away(f"the weight of {name!r}", weight)
            if not sharded:
                refuse_tensor_parallel(f"the weight of {name!r}", weight)
        reason = _why_kept(layer, sharded)
        if reason is not None:
            report.fallbacks[name] = reason
            continue
        bases = write.get(name), read.get(name)
        GraspLoRALinear.adopt(layer, *bases, project, closed, backend, factors)
        if pad_weights:
            layer.pad_weight_()
        report.replaced.append(name)
        if name in write:
            report.write_projected.append(name)
        if name in read:
            report.read_projected.append(name)
    if project == "residual":
        report.hooked_writers = _hook_writers(model, write, set(report.replaced))
    return report


def restore_lora_layers(model: nn.Module) -> None:
    """Back to stock peft layers in place, with the weights that the model computed with."""
    for module in model.modules():
        if isinstance(module, GraspLoRALinear):
            module.release()
    for handle in model.__dict__.pop(_HOOKS, ()):
        handle.remove()


def _check_options(project: str, backend: str) -> None:
    if project not in PROJECTIONS:
        raise ValueError(f"project is {project!r}; use one of {PROJECTIONS}.")
    if backend not in ("auto", *backends()):
        raise ValueError(
            f"backend {backend!r} is unknown; use 'auto' or one of {list(backends())}."
        )


def _why_kept(layer: LoraLayer, sharded: bool) -> str | None:
    if type(layer) not in (lora.Linear, GraspLoRALinear):
        return f"a {type(layer).__name__} layer of peft has no operator here"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (device_map and offloading do that)"
    reasons = (why_never(layer, adapter, sharded=sharded) for adapter in layer.lora_A)
    return next((reason for reason in reasons if reason is not None), None)


def _bases(
    model: nn.Module, subspace: Subspace, known: Iterable[Site]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The bases by module name, checked against the model."""
    modules = {base_name(name): module for name, module in model.named_modules()}
    write = dict(subspace.write)
    if subspace.stream is not None:
        for site in known:
            if site.role == "write":
                write.setdefault(site.name, subspace.stream)
    for role, bases in (("write", write), ("read", subspace.read)):
        for name, basis in bases.items():
            if name not in modules:
                raise ValueError(
                    f"the subspace has a {role} basis for {name!r}, which the model does not have; "
                    "identify the subspace on an adapter of this model."
                )
            module: Any = modules[name]
            width = module.out_features if role == "write" else module.in_features
            if basis.shape[0] != width:
                raise ValueError(
                    f"the {role} basis for {name!r} has {basis.shape[0]} rows but the layer has "
                    f"{width} features; identify the subspace on an adapter of this model."
                )
    return write, dict(subspace.read)


def _hook_writers(model: nn.Module, write: dict[str, Tensor], replaced: set[str]) -> list[str]:
    """Project the gradient of the writers that no operator covers, by a forward hook each."""
    hooked, handles = [], []
    for name, module in model.named_modules():
        if name.endswith(".base_layer") or base_name(name) in replaced:
            continue
        if base_name(name) in write:
            handles.append(module.register_forward_hook(_Projection(write[base_name(name)])))
            hooked.append(base_name(name))
    model.__dict__[_HOOKS] = handles
    return hooked


class _Projection:
    """A forward hook that leaves the output as it is and projects its gradient."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.basis.device != output.device:
            self.basis = self.basis.to(output.device)
        return project_gradient(output, self.basis)
