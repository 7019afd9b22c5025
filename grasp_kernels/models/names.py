"""The name of a module: in a model, in a wrapper, in a file, and as a part of another module.

Base names are those of the base model: "model.layers.0.self_attn.o_proj".
"""

import re
from collections.abc import Container, Iterable
from typing import NamedTuple

from torch import nn

_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_OUTSIDE = ("module.", "base_model.model.")  # DDP, peft; each may be around the other


def base_name(name: str) -> str:
    """Return the name without the parts of wrappers.

    Wrappers are DDP, FSDP, checkpointing, compilation, and peft ("base_model.model." in front and
    ".base_layer" inside).
    """
    name = _WRAPPERS.sub("", f"{name}.")[:-1]
    while name.startswith(_OUTSIDE):
        for wrapper in _OUTSIDE:
            name = name.removeprefix(wrapper)
    return name.replace(".base_layer", "")


def same_module(name: str, known: Iterable[str]) -> str | None:
    """Return the known name of the module `name`; None where there is none.

    A task model and its bare backbone name a module differently ("model.layers.0.mlp",
    "layers.0.mlp"), so names may differ by leading components, and by the "language_model." of a
    text model next to a model for images.

    Raises:
        ValueError: several known names differ by such components.
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
            f"{name!r} could be any of {sorted(ends)[:4]}; give the base model of the adapter."
        )
    return ends[0] if ends else None


def _of_text(name: str) -> str:
    return name.replace("language_model.", "")


# The parts of one expert -> the parameter with the parts of all experts, and the place in it.
_EXPERT_PARTS = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", 0)),
}
_EXPERT = re.compile(r"(.*\bexperts)\.(\d{1,6})\.(\w+)$")


class ExpertPart(NamedTuple):
    """Hold the place of one expert's module in the parameter `whole` of all experts."""

    whole: str
    expert: int
    place: int  # index among parts in a row, such as gate and up


def expert_part(name: str) -> ExpertPart | None:
    """Return the place of one expert's module: "experts.3.up_proj" in "experts.gate_up_proj".

    Files and adapters name each expert where the model holds all of them as one parameter.
    """
    match = _EXPERT.match(stored_name(name))
    if match is None or match[3] not in _EXPERT_PARTS:
        return None
    part, place = _EXPERT_PARTS[match[3]]
    return ExpertPart(f"{match[1]}.{part}", int(match[2]), place)


def stored_name(name: str) -> str:
    """Return the name of a module or tensor in a checkpoint folder, without its ".weight"."""
    name = re.sub(r"\bblock_sparse_moe\b", "mlp", name.removesuffix(".weight"))  # Mixtral
    name = re.sub(r"^language_model\.lm_head\b", "lm_head", name)
    return re.sub(r"^language_model\.model\.", "model.language_model.", name)  # next to images


def adapted_name(name: str, layer: nn.Module) -> str:
    """Return the base name of the module or parameter adapted by the LoRA layer `name`."""
    parameter = getattr(layer, "parameter_name", None)
    return base_name(name) if parameter is None else f"{base_name(name)}.{parameter}"
