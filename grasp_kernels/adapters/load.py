"""A peft adapter (model, folder or file) -> the LoRA weights of each site of the residual stream.

Shapes: `R` LoRA rank, `K` inputs and `N` outputs of a linear layer. The change of a weight is
`ΔW[N,K] = scaling · lora_B[N,R] · lora_A[R,K]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.adapters.base_model import BaseModel, read_base_model
from grasp_kernels.adapters.files import (
    CONFIG,
    Factors,
    config_model_type,
    find_weights,
    listed,
    read_config,
    read_weights,
    refuse_variants,
)
from grasp_kernels.processes import gathered, refuse_away, whole
from grasp_kernels.sites import Site, SiteRules, base_name, site_rules

# these start from a base whose weights were changed, so B·A alone is not the change of the weights
MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoRAWeights:
    """The two factors of one adapted site, in the dtype they are stored in.

    `gain[D]` is that of the norm between the site and the stream, None where there is none or it is
    not known.
    """

    site: Site
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    gain: Tensor | None


@dataclass(frozen=True)
class Adapter:
    """All adapted sites of an adapter, and what was left out (`notes`, one sentence each)."""

    layers: tuple[LoRAWeights, ...]
    source: str
    base_model: str | None
    model_type: str | None
    n_layers: int | None
    rules: SiteRules
    notes: tuple[str, ...]


def load_adapter(
    source: Any,
    *,
    adapter_name: str | None = None,
    base_model: nn.Module | str | PathLike[str] | None = None,
    sites: SiteRules | None = None,
) -> Adapter:
    """Load the LoRA weights of an adapter with the sites they belong to.

    Args:
        source: a peft model, an adapter folder (also a Trainer checkpoint), or an
            `adapter_model.safetensors` file with its `adapter_config.json` beside it.
        adapter_name: which adapter, where there are several: of a model the active one by default,
            of a folder the one in the folder itself.
        base_model: module or checkpoint folder for type, depth and norm gains; by default the peft
            model itself, or the folder that `adapter_config.json` names if it exists here.
        sites: rules for architectures that are not known.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: not a plain LoRA adapter, non-finite or untrained weights, unknown architecture.
    """
    if isinstance(source, nn.Module):
        with gathered(source):
            return _from_model(source, adapter_name, base_model, sites)
    if not isinstance(source, (str, PathLike)):
        raise TypeError(
            f"An adapter cannot be read from a {type(source).__name__}; give a peft model, an "
            "adapter folder or a .safetensors file."
        )
    weights = find_weights(Path(source), adapter_name)
    config = read_config(weights.parent / CONFIG)
    stored_base = config.get("base_model_name_or_path")
    if base_model is None and stored_base and (Path(stored_base) / "config.json").is_file():
        base_model = stored_base
    factors, notes = read_weights(weights, config, adapter_name)
    base = read_base_model(base_model)
    model_type = base.model_type or config_model_type(config)
    return _assemble(factors, notes, str(source), stored_base, base, model_type, config, sites)


def _assemble(
    factors: list[Factors],
    notes: list[str],
    source: str,
    base_model: str | None,
    base: BaseModel,
    model_type: str | None,
    config: Mapping[str, Any],
    sites: SiteRules | None,
) -> Adapter:
    """Check every weight and attach its site."""
    for entry in factors:
        _check(entry)
    rules = site_rules(model_type, (entry.name for entry in factors), sites)
    layers: list[LoRAWeights] = []
    outside: list[str] = []
    gains: dict[str, Tensor | None] = {}
    for entry in factors:
        site = rules.site(entry.name)
        if site is None:
            outside.append(entry.name)
            continue
        if site.norm and site.norm not in gains:
            weight = base.norm_weight(site.norm)
            gains[site.norm] = None if weight is None else site.gain(weight)
        gain = gains[site.norm] if site.norm else None
        layers.append(LoRAWeights(site, entry.lora_A, entry.lora_B, entry.scaling, gain))
    if not layers:
        raise ValueError(
            f"The adapter {source!r} has no LoRA weights on a writer or a reader of the residual "
            f"stream (it adapts {sorted(outside)[:4]}); name them with sites=SiteRules(...)."
        )
    if not any(bool(layer.lora_B.any()) for layer in layers):
        raise ValueError(
            f"The adapter {source!r} is untrained (every lora_B is zero); give one that was "
            "trained for at least one step."
        )
    if model_type is None and sites is None:
        notes.append(
            "The model type is not known and the modules are called as in Llama, so that is what "
            "it counts as; give base_model if it is another one (Gemma, OLMo)."
        )
    if outside:
        notes.append(f"LoRA weights outside of the sites are not used: {listed(outside)}.")
    start = str(config.get("init_lora_weights"))
    if start.startswith(MOVED_BASE):
        notes.append(
            f"The adapter was initialised with {start!r}, which changes the base weights, so B·A "
            "contains that initialisation beside what was learned."
        )
    layers.sort(key=lambda layer: (layer.site.layer, layer.site.name))
    return Adapter(
        tuple(layers), source, base_model, model_type, base.n_layers, rules, tuple(notes)
    )


def _check(entry: Factors) -> None:
    for factor, weight in (("A", entry.lora_A), ("B", entry.lora_B)):
        key = entry.key.format(factor)
        if weight.ndim != 2:
            raise ValueError(
                f"{key!r} has shape {tuple(weight.shape)}; only LoRA on linear layers is "
                "supported, so train without convolution and expert-parameter targets."
            )
        if not weight.dtype.is_floating_point:
            raise ValueError(f"{key!r} is {weight.dtype}; save the adapter in a floating dtype.")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{key!r} has non-finite values; take an earlier checkpoint, before training "
                "diverged."
            )
    if entry.lora_A.shape[0] != entry.lora_B.shape[1] or entry.lora_A.shape[0] == 0:
        raise ValueError(
            f"{entry.key.format('A')!r} has shape {tuple(entry.lora_A.shape)} and its lora_B "
            f"{tuple(entry.lora_B.shape)}; they must share a rank of at least 1, so save the "
            "adapter again."
        )


def _from_model(
    model: nn.Module,
    adapter_name: str | None,
    base_model: nn.Module | str | PathLike[str] | None,
    sites: SiteRules | None,
) -> Adapter:
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise ValueError(
            f"The {type(model).__name__} carries no adapter; wrap it with peft.get_peft_model "
            "first."
        )
    if adapter_name is None:
        active = getattr(model, "active_adapter", None)
        adapter_name = (
            active if isinstance(active, str) and active in configs else next(iter(configs))
        )
    if adapter_name not in configs:
        raise ValueError(
            f"The model has no adapter {adapter_name!r}; give one of {sorted(configs)}."
        )
    config = vars(configs[adapter_name])
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise ValueError(
            f"The adapter {adapter_name!r} is of type {kind}; only peft's LORA is supported."
        )
    refuse_variants(adapter_name, config)
    base = read_base_model(model if base_model is None else base_model)
    return _assemble(
        list(_model_factors(model, adapter_name)),
        [],
        f"{type(model).__name__}:{adapter_name}",
        config.get("base_model_name_or_path"),
        base,
        base.model_type,
        config,
        sites,
    )


def _model_factors(model: nn.Module, adapter_name: str) -> Iterator[Factors]:
    for name, module in model.named_modules():
        if adapter_name in getattr(module, "lora_embedding_A", ()):
            raise ValueError(
                f"{base_name(name)!r} is an embedding with LoRA, which is not supported; train "
                "without embeddings in target_modules."
            )
        if adapter_name in getattr(module, "lora_A", ()):
            A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
            refuse_away(f"lora_A of {base_name(name)!r}", A)
            yield Factors(
                base_name(name),
                f"{name}.lora_{{}}.{adapter_name}.weight",
                whole(A).clone(),  # what FSDP has gathered is freed again
                whole(B).clone(),
                float(module.scaling[adapter_name]),
            )
