"""A peft adapter (model, folder or file) -> the LoRA weights of its layers, with their sites.

Shapes: `R` LoRA rank, `K` inputs and `N` outputs of a linear layer. The change of a weight is
`ΔW[N,K] = scaling · lora_B[N,R] · lora_A[R,K]`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from os import PathLike
from os.path import isfile, join
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grasp_kernels.adapters.files import (
    LoRAWeights,
    Parts,
    config_model_type,
    read_parts,
    refuse_variants,
)
from grasp_kernels.inert import inert, listed, shown
from grasp_kernels.models.architectures import SiteRules, site_rules
from grasp_kernels.models.names import adapted_name, base_name
from grasp_kernels.models.sharding import gathered, refuse_away, whole
from grasp_kernels.models.tensors import refuse_nonfinite
from grasp_kernels.models.weights import BaseModel, Source, read_base_model

_OWN_PARTS = ("modules_to_save", "trainable_tokens_delta", "lora_embedding_A")  # of an adapter
_OWN = "give the base model that the adapter was trained on"
_MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What makes a plain adapter of one that moved its base.
CONVERT = "save it by peft's save_pretrained(OUT, path_initial_model_for_weight_conversion=START)"


def moved_base(config: Mapping[str, Any]) -> str | None:
    """Return the initialisation that moved pretrained weights into the adapter, or None.

    `B A` alone is not the change of the weights then.
    """
    start = str(config.get("init_lora_weights"))
    return inert(start) if start.startswith(_MOVED_BASE) else None


@dataclass(frozen=True)
class Adapter:
    """Hold all layers of an adapter, and its assumptions (`notes`, one sentence each).

    Each expert of a mixture may be adapted by itself: several layers then have one site.
    """

    layers: tuple[LoRAWeights, ...]
    source: str
    base_model: str | None
    model_type: str | None
    rules: SiteRules
    notes: tuple[str, ...]


def load_adapter(
    source: Any,
    *,
    adapter_name: str | None = None,
    base_model: Source | None = None,
    sites: SiteRules | None = None,
) -> Adapter:
    """Load the LoRA weights of an adapter with their sites.

    Args:
        source: a peft model, an adapter folder (also a Trainer checkpoint), or an
            `adapter_model.safetensors` file next to its `adapter_config.json`.
        adapter_name: which adapter, where there are several: of a model the active one by default,
            of a folder the one in the folder itself.
        base_model: module or checkpoint folder for type and norm gains; by default the peft
            model itself, or the folder that `adapter_config.json` names if it exists here.
        sites: rules for unknown architectures.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: not a plain LoRA adapter, non-finite or untrained weights, unknown architecture.
    """
    model = source if isinstance(source, nn.Module) else None
    with nullcontext() if model is None else gathered(model):
        parts = adapter_parts(source, adapter_name)
        if model is not None:
            _refuse_other_adapters(model, parts)
        named = parts.config.get("base_model_name_or_path")
        if base_model is None and model is None and named and isfile(join(named, "config.json")):
            base_model = named
        base = read_base_model(model if base_model is None else base_model)
        return _assemble(parts, base, base.model_type or config_model_type(parts.config), sites)


def adapter_parts(source: Any, adapter_name: str | None = None) -> Parts:
    """Return every tensor of an adapter: checked LoRA factors, and the other trained tensors.

    All adapters of models and files are read by this function. The caller gathers the weights of a
    model sharded over processes.

    Args:
        source, adapter_name: see `load_adapter`.

    Raises:
        FileNotFoundError, TypeError, ValueError: no adapter there, or one that cannot be used.
    """
    is_model = isinstance(source, nn.Module)
    if is_model:
        name = active_adapter(source, adapter_name)
        config = (getattr(source, "peft_config", None) or {}).get(name)
        factors = tuple(_model_factors(source, name))
        others = dict(_model_others(source, name, getattr(config, "bias", "none")))
        called = f"{type(source).__name__}:{name}"
        parts = Parts(factors, others, {} if config is None else vars(config), called)
    elif isinstance(source, (str, PathLike)):
        parts = read_parts(Path(source), adapter_name)
    else:
        raise TypeError(
            f"An adapter cannot be read from a {type(source).__name__}; give a peft model, an "
            "adapter folder or a .safetensors file."
        )
    for entry in parts.factors:
        _check(entry, experts=is_model)
    for name, read in parts.others.items():
        if not is_model:  # a model's may be sharded, and are not read
            refuse_nonfinite(name, read())
    return parts


def _assemble(
    parts: Parts, base: BaseModel, model_type: str | None, sites: SiteRules | None
) -> Adapter:
    """Attach to every weight its site, and the gain of the norm after the site."""
    rules = site_rules(model_type, (entry.name for entry in parts.factors), sites)
    layers: list[LoRAWeights] = []
    gains: dict[str, Tensor | None] = {}
    for entry in parts.factors:
        site, width = rules.site(entry.name), entry.lora_B.shape[0]
        if rules.split(entry.name) and not base.has(entry.name):
            raise ValueError(f"The base {shown(base.source)} has no {shown(entry.name)}; {_OWN}.")
        if site is not None and base.width not in (None, width):
            raise ValueError(
                f"The base model {shown(base.source)} has width {shown(base.width)}, but the "
                f"adapter writes width {width} at {shown(entry.name)}; {_OWN}."
            )
        if site is not None and site.norm and site.norm not in gains:
            weight = base.norm_weight(site.norm, width)
            gains[site.norm] = None if weight is None else site.gain(weight)
        gain = gains[site.norm] if site is not None and site.norm else None
        layers.append(replace(entry, site=site, gain=gain))
    if not any(bool(layer.lora_B.any()) for layer in layers):
        raise ValueError(
            f"The adapter {parts.source!r} is untrained (every lora_B is zero); give one that was "
            "trained for at least one step."
        )
    layers.sort(key=lambda layer: ((rules.split(layer.name) or ("", -1))[1], layer.name))
    notes = tuple(_notes(parts, known=model_type is not None or sites is not None))
    stored_base = parts.config.get("base_model_name_or_path")
    return Adapter(tuple(layers), parts.source, stored_base, model_type, rules, notes)


def _notes(parts: Parts, known: bool) -> Iterator[str]:
    """Yield the omissions and assumptions, one sentence each."""
    if parts.others:
        yield f"The adapter also holds weights that are not LoRA factors: {listed(parts.others)}."
    if not known:
        yield (
            "The model type is unknown and the modules are named as in Llama, so the model is "
            "taken for a Llama; give the base model if it is not (Gemma has these names, too)."
        )
    biased = [entry.name for entry in parts.factors if entry.bias is not None]
    if biased:
        yield f"The biases of lora_B are not used: {listed(biased)}."
    if start := moved_base(parts.config):
        yield (
            f"The adapter was initialised with '{start}', which changes the base weights, "
            "so B·A contains that initialisation in addition to the training."
        )


def _check(entry: LoRAWeights, experts: bool) -> None:
    """Raise unless factors are finite `A[R, K]` and `B[N, R]`, or `experts` stacks of such."""
    A, B, bias = entry.lora_A, entry.lora_B, entry.bias
    key_A, key_B, *_ = entry.keys
    weights = {key_A: A, key_B: B}
    for name, weight in weights.items():
        if weight.ndim != 2 and not (experts and weight.ndim == 3 and len(A) == len(B)):
            raise ValueError(
                f"{shown(name)} has shape {tuple(weight.shape)}; only LoRA on linear layers is "
                "supported, so train without convolution and expert-parameter targets."
            )
    if bias is not None:
        weights[f"the bias of {key_B}"] = bias
    for name, weight in weights.items():
        if not weight.dtype.is_floating_point:
            raise ValueError(f"{shown(name)} has dtype {weight.dtype}; save it in a float dtype.")
        refuse_nonfinite(name, weight)
    if A.shape[-2] != B.shape[-1] or not (A.numel() and B.numel()):
        raise ValueError(
            f"{shown(key_A)} has shape {tuple(A.shape)} and its lora_B {tuple(B.shape)}; they "
            "must share a rank of at least 1, so save the adapter again."
        )
    if bias is not None and bias.shape != B.shape[-2:-1]:
        raise ValueError(
            f"The bias of {shown(key_B)} has shape {tuple(bias.shape)}, expected "
            f"{tuple(B.shape[-2:-1])}; save the adapter again."
        )


def _refuse_other_adapters(model: nn.Module, parts: Parts) -> None:
    """Raise for an adapter of a model with more than LoRA on linear layers."""
    kind = getattr(parts.config.get("peft_type"), "value", None)
    if kind != "LORA":
        raise ValueError(f"The adapter {parts.source!r} is of type {kind}; only LORA is supported.")
    refuse_variants(parts.source, parts.config)
    adapter = parts.source.rpartition(":")[2]
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_embedding_A", ()):
            raise ValueError(
                f"{base_name(name)!r} is an embedding with LoRA, which is not supported; train "
                "without embeddings in target_modules."
            )


def active_adapter(model: nn.Module, adapter_name: str | None = None) -> str:
    """Return the active adapter of a model, or the named one.

    Raises:
        ValueError: the model has no adapter of that name, or not exactly one active adapter.
    """
    layers = [layer for _, layer in _lora_layers(model)]
    there = dict.fromkeys(chain.from_iterable(layer.lora_A for layer in layers))
    there |= dict.fromkeys(getattr(model, "peft_config", None) or {})
    if adapter_name is not None:
        if adapter_name not in there:
            raise ValueError(f"There is no adapter {adapter_name!r}; give one of {sorted(there)}.")
        return adapter_name
    active = dict.fromkeys(
        name for layer in layers for name in layer.active_adapters if name in layer.lora_A
    )
    names = list(active or there)
    if not names:
        raise ValueError(
            f"The {type(model).__name__} has no adapter; wrap it with peft.get_peft_model first."
        )
    if len(names) != 1:
        raise ValueError(
            f"The model has the {'active ' if active else ''}adapters {names}, but only one at a "
            "time can be read; choose it with adapter_name, or activate it alone with set_adapter."
        )
    return names[0]


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and (
            module.lora_A or getattr(module, "lora_embedding_A", None)
        ):
            yield name, module


def _model_factors(model: nn.Module, adapter: str) -> Iterator[LoRAWeights]:
    """Yield the factors of each layer; `A[E, R, K]`, `B[E, N, R]` for E experts.

    peft stores the factors of experts flat.
    """
    for name, layer in _lora_layers(model):
        if adapter not in layer.lora_A:
            continue
        adapted = adapted_name(name, layer)
        refuse_away(f"lora_A of {adapted!r}", layer.lora_A[adapter].weight)
        closing = getattr(layer, "computing_closed", None)
        with closing(as_saved=True) if closing else nullcontext():
            A, B = (whole(part[adapter].weight).clone() for part in (layer.lora_A, layer.lora_B))
            bias = getattr(layer.lora_B[adapter], "bias", None)
        if hasattr(layer, "parameter_name"):
            E = layer.num_experts
            A, B = A.reshape(E, -1, A.shape[1]), B.reshape(B.shape[0], -1, E).permute(2, 0, 1)
        bias = None if bias is None else whole(bias).clone()
        keys = tuple(f"{name}.lora_{part}.{adapter}.weight" for part in "AB")
        scaling = float(layer.scaling[adapter])
        yield LoRAWeights(adapted, None, A, B, scaling, bias=bias, keys=keys)


def _model_others(
    model: nn.Module, adapter: str, bias: str
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the parameters of an adapter, or trained with it, other than LoRA factors.

    Args:
        bias: the biases of the base trained with the adapter, "none", "all" or "lora_only".
    """
    adapted = {name for name, layer in _lora_layers(model) if adapter in layer.lora_A}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        own = any(f".{kind}.{adapter}" in name for kind in _OWN_PARTS)
        of_adapted = name.removesuffix(".base_layer.bias") in adapted
        trained = bias == "all" or (bias == "lora_only" and of_adapted)
        if own or (trained and name.endswith(".bias")) or parameter.requires_grad:
            yield base_name(name), partial(whole, parameter)
