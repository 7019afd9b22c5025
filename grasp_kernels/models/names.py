"""What a module is called: in a model, in what wraps it, in a file, and as a part of another.

Base names are those of the base model: "model.layers.0.self_attn.o_proj".
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_OUTSIDE = ("module.", "base_model.model.")  # DDP, peft; each may be around the other


def base_name(name: str) -> str:
    """The name without what wraps the module: DDP, FSDP, checkpointing, compilation, and peft's
    "base_model.model." before and ".base_layer" in it."""
    name = _WRAPPERS.sub("", f"{name}.")[:-1]
    while name.startswith(_OUTSIDE):
        for wrapper in _OUTSIDE:
            name = name.removeprefix(wrapper)
    return name.replace(".base_layer", "")


def same_module(name: str, known: Iterable[str]) -> str | None:
    """The one of the known names that means the module `name`; None where there is none.

    A task model and its bare backbone name a module differently ("model.layers.0.mlp",
    "layers.0.mlp"), so names may differ by leading components, and by the "language_model." that a
    text model has where it stands beside one for images.

    Raises:
        ValueError: several differ by those.
    """
    known = known if isinstance(known, Container) else set(known)
    if name in known:
        return name
    end = f".{_of_text(name)}"
    ends = [
        one
        for one in known
        if one and (f".{_of_text(one)}".endswith(end) or end.endswith(f".{_of_text(one)}"))
    ]
    if len(ends) > 1:
        raise ValueError(
            f"{name!r} could be any of {sorted(ends)[:4]}; give the base model on which the "
            "adapter was trained."
        )
    return ends[0] if ends else None


def _of_text(name: str) -> str:
    return name.replace("language_model.", "")


# The parts of one expert -> the parameter that holds those of all experts, and where in it.
_EXPERT_PARTS = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", 0)),
}
_EXPERT = re.compile(r"(.*\bexperts)\.(\d{1,6})\.(\w+)$")


class ExpertPart(NamedTuple):
    """Which part of the parameter `whole`, of all experts, a module of one expert is."""

    whole: str
    expert: int
    place: int  # of those that lie one after the other, such as gate and up


def expert_part(name: str) -> ExpertPart | None:
    """What a module of one expert is part of: "experts.3.up_proj" of "experts.gate_up_proj".

    Files and adapters name each expert where the model holds all of them as one parameter.
    """
    match = _EXPERT.match(_stored_name(name))
    if match is None or match[3] not in _EXPERT_PARTS:
        return None
    part, place = _EXPERT_PARTS[match[3]]
    return ExpertPart(f"{match[1]}.{part}", int(match[2]), place)


def _stored_name(name: str) -> str:
    """What a checkpoint calls otherwise than the modules, as the modules call it."""
    name = re.sub(r"\bblock_sparse_moe\b", "mlp", name)  # Mixtral
    name = re.sub(r"^language_model\.lm_head\b", "lm_head", name)
    return re.sub(r"^language_model\.model\.", "model.language_model.", name)  # beside images


def stored_name(name: str) -> str:
    """The module name of a tensor in a checkpoint folder, without its ".weight"."""
    return _stored_name(name.removesuffix(".weight"))


def adapted_name(name: str, layer: nn.Module) -> str:
    """The base name of what a LoRA layer called `name` adapts: a module, or a parameter of one."""
    parameter = getattr(layer, "parameter_name", None)
    return base_name(name) if parameter is None else f"{base_name(name)}.{parameter}"


def adapted_layers(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, Any]]:
    """The layers with a LoRA adapter of that name, by the name of what they adapt.

    Not those that adapt a parameter, as of stacked experts: what it is multiplied with is inside.
    """
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_A", ()) and not hasattr(module, "parameter_name"):
            yield base_name(name), module


def model_names(model: nn.Module) -> tuple[str, ...]:
    """The base names of all modules of a model, and then of its parameters."""
    modules = (name for name, _ in model.named_modules())
    parameters = (name for name, _ in model.named_parameters())
    return tuple(dict.fromkeys(base_name(name) for name in chain(modules, parameters)))
