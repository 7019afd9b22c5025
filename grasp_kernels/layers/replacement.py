"""Put a peft model on GraspLoRALinear, and back.

Shapes: K in, N out, Q basis size, D residual width.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from grasp_kernels.adapters.load import moved_base
from grasp_kernels.layers.closed import ClosedLayer, GraspLoRAExperts
from grasp_kernels.layers.gated import GatedMLP, adopt_gated
from grasp_kernels.layers.linear import GraspLoRALinear, why_never
from grasp_kernels.layers.projected import why_adapter_never
from grasp_kernels.layers.quantised import library_of, quantised, why_wrong_gradient
from grasp_kernels.models.architectures import (
    Site,
    SiteRules,
    model_gains,
    model_sites,
    written_width,
)
from grasp_kernels.models.names import adapted_name, base_name
from grasp_kernels.models.sharding import by_fsdp2, refuse_away, refuse_tensor_parallel
from grasp_kernels.ops import project_gradient
from grasp_kernels.subspace import Subspace, check_subspace


@dataclass
class Replacement:
    """Result of `apply_grasp`, printed as a table; names are those of the base model."""

    replaced: list[str] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=dict)  # name -> library of its weight
    projected: list[str] = field(default_factory=list)  # with a basis of the subspace
    gated: list[str] = field(default_factory=list)  # MLPs that keep no product for the backward
    hooked_writers: list[str] = field(default_factory=list)  # only dY is projected
    fallbacks: dict[str, str] = field(default_factory=dict)  # name -> why it stays with peft

    def __str__(self) -> str:
        rows = [
            ("layers on GraspLoRALinear", len(self.replaced)),
            *(
                (f"  base product by {library}", count)
                for library, count in Counter(self.libraries.values()).items()
            ),
            ("  with a basis", len(self.projected)),
            ("MLPs that keep no product for the backward", len(self.gated)),
            ("other places where the gradient is projected", len(self.hooked_writers)),
            ("layers that stay with peft", len(self.fallbacks)),
        ]
        width = max(len(title) for title, _ in rows)
        lines = [f"{title:<{width}}  {count:>4}" for title, count in rows]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.fallbacks.items()])


def replace_lora_layers(
    model: nn.Module,
    subspace: Subspace | None = None,
    *,
    closed: bool = True,
    backend: str = "auto",
    sites: SiteRules | None = None,
) -> Replacement:
    """Swap the LoRA layers of a peft model in place; see `apply_grasp`.

    The output of a writer before a norm is not in the stream, so the output of that norm is
    projected instead, and likewise the output of a mixture of experts; such a writer is only kept
    closed. The basis of a writer before a norm has the norm's gain folded in, so that its update
    moves nothing along the subspace but by the common scale of the norm.
    """
    check_subspace(subspace)
    layers = {
        adapted_name(name, module): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    if not layers:
        raise ValueError(
            "the model has no LoRA layers; wrap it with peft.get_peft_model before replacing them."
        )
    report = Replacement()
    bases: dict[str, Tensor] = {}
    before_norm: set[str] = set()
    if subspace is not None:
        writers = model_sites(model, sites)
        before_norm = {site.name for site in writers if site.norm is not None}
        bases = bases_in(model, subspace, writers)
        if closed:
            _check_starts(model)
            _check_trained(model, writers)
    sharded = by_fsdp2(model)
    for name, layer in layers.items():
        if name in bases:
            _check_weight(name, layer, sharded)
    restore_lora_layers(model)  # only now: a refused model stays unchanged

    told = set[str]()
    for name, layer in layers.items():
        reason = _why_kept(layer, sharded)
        if reason is not None:
            report.fallbacks[name] = reason
            if type(layer) is ParamWrapper:
                GraspLoRAExperts.adopt(layer, bases.get(name), closed, told)
            continue
        V, mode = bases.get(name), "residual"
        if name in before_norm:
            # The norm's output is projected; the layer itself is closed, or else left as it is.
            V, mode = V if closed else None, "weights"
        library = library_of(layer)
        ours = GraspLoRALinear if library is None else quantised(layer.__class__)
        ours.adopt(layer, V, mode, closed, backend, told)
        if library is not None:
            report.libraries[name] = library
        report.replaced.append(name)
        if V is not None:
            report.projected.append(name)
    report.gated = [base_name(name) for name in adopt_gated(model)]
    in_stream = {name: V for name, V in bases.items() if name not in before_norm}
    report.hooked_writers = _hook_writers(model, in_stream, set(report.replaced))
    if report.fallbacks:
        reasons = "; ".join(dict.fromkeys(report.fallbacks.values()))
        warnings.warn(
            f"{len(report.fallbacks)} of {len(layers)} LoRA layers stay with peft and are not "
            f"accelerated ({reasons}); the returned report names them.",
            stacklevel=2,
        )
    return report


def restore_lora_layers(model: nn.Module) -> None:
    """Restore stock peft layers in place, with the weights of the model's forward.

    After a merge and unload by peft, only the projection of writers without an adapter is left to
    remove.
    """
    for module in model.modules():
        if isinstance(module, (ClosedLayer, GatedMLP)):
            module.release()
            # A hook of accelerate calls the forward of the former class.
            if getattr(module.__dict__.get("_old_forward"), "__self__", None) is module:
                module.__dict__["_old_forward"] = MethodType(type(module).forward, module)
        _unhook(module)


def _check_weight(name: str, layer: LoraLayer, sharded: bool) -> None:
    """Raise unless all features of an adapted weight are in one place, as a basis needs."""
    experts = isinstance(layer, ParamWrapper)
    weight = layer.get_param() if experts else layer.get_base_layer().weight
    refuse_away(f"the weight of {name!r}", weight)
    if not sharded:
        refuse_tensor_parallel(f"the weight of {name!r}", weight)


def _check_starts(model: nn.Module) -> None:
    """Raise if closing would remove pretrained content."""
    for name, config in getattr(model, "peft_config", {}).items():
        if start := moved_base(vars(config)):
            raise ValueError(
                f"the adapter {name!r} was initialised with {start!r}, which moves pretrained "
                "weights into it, and closing would remove them along the subspace; pass "
                "orthogonal=False, or initialise with init_lora_weights=True."
            )


def _check_trained(model: nn.Module, writers: Iterable[Site]) -> None:
    """Raise for a trained weight that moves the stream by itself: LoRA factors alone are closed.

    These are the weights and biases of writers, of norms after them, and of embeddings.
    """
    known = {name for site in writers for name in (site.name, site.norm)}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or ".lora_" in path:
                continue
            # Where peft keeps a trained copy of a module, and trained rows of an embedding.
            name = re.split(r"\.(?:modules_to_save|token_adapter)\b", base_name(path))[0]
            of_embedding = isinstance(module, nn.Embedding) or "trainable_tokens_delta" in path
            if of_embedding or name in known or f"{name}.{leaf}" in known:
                raise ValueError(
                    f"the {leaf} of {name!r} is trained too, and nothing keeps its change out of "
                    'the subspace; train with bias="none" and without modules_to_save there '
                    "(lora_bias=True is kept out), or pass orthogonal=False."
                )


def _why_kept(layer: LoraLayer, sharded: bool) -> str | None:
    if isinstance(layer, ParamWrapper):
        return "LoRA on a raw parameter is computed by peft"
    reason = None if sharded else why_wrong_gradient(layer)
    if reason is not None:
        return reason
    known = library_of(layer) is not None
    if not known and type(layer) not in (lora.Linear, GraspLoRALinear):
        return f"peft's {type(layer).__name__} layer has no operator here"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (device_map and offloading do that)"
    why = why_adapter_never if known else why_never
    reasons = (why(layer, adapter, sharded=sharded) for adapter in layer.lora_A)
    return next((reason for reason in reasons if reason is not None), None)


def bases_in(model: nn.Module, subspace: Subspace, writers: Iterable[Site]) -> dict[str, Tensor]:
    """Return the basis `[N, Q]` of each writer by its name, with the gains of this model.

    Raises:
        ValueError: a writer has another width.
    """
    modules = {base_name(name): module for name, module in model.named_modules()}
    writers = list(writers)
    gains = model_gains(model, writers)
    for site in writers:
        width = written_width(modules[site.name]) if site.name in modules else None
        if width not in (None, len(subspace.basis)):
            raise ValueError(
                f"the subspace has width {len(subspace.basis)} but {site.name!r} writes {width} "
                "features; identify the subspace on an adapter of this model."
            )
    return {site.name: subspace.at(site, gains.get(site.norm or "")) for site in writers}


def _hook_writers(model: nn.Module, bases: dict[str, Tensor], replaced: set[str]) -> list[str]:
    """Project the gradient of each writer without the operator by a forward hook."""
    hooked = []
    for name, module in model.named_modules():
        if name.endswith(".base_layer") or base_name(name) in replaced:
            continue
        if base_name(name) in bases:
            module.register_forward_hook(_Projection(bases[base_name(name)]))
            if not isinstance(module, LoraLayer):
                # peft's unload() calls this on every module, and puts the result in its place.
                module.unload_and_optionally_merge_module = partial(_unhook, module)
            hooked.append(base_name(name))
    return hooked


def _unhook(module: nn.Module, **_: Any) -> nn.Module:
    """Remove the projection from a module and return the module."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, _Projection):
            del module._forward_hooks[key]
            module.__dict__.pop("unload_and_optionally_merge_module", None)
    return module


class _Projection:
    """Project the gradient of an output in a forward hook; the output stays unchanged."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # attention returns its weights too
            return self(module, inputs, output[0]), *output[1:]
        if self.basis.device != output.device:
            self.basis = self.basis.to(output.device)
        return project_gradient(output, self.basis)
