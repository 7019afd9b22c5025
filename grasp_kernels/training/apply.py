"""A peft model and a config -> the same model on GraspLoRALinear, and back."""

from dataclasses import replace
from os import PathLike, fspath
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from grasp_kernels.config import GraspConfig
from grasp_kernels.layers.replacement import Replacement, replace_lora_layers, restore_lora_layers
from grasp_kernels.models.names import base_name
from grasp_kernels.subspace import Subspace, check_subspace, identify
from grasp_kernels.subspace.basis import is_subspace

_APPLIED = "_grasp_config"  # attribute of a model with the config that was applied


def apply_grasp(model: nn.Module, config: GraspConfig | None = None) -> Replacement:
    """Put the LoRA layers of a peft model on GraspLoRALinear, in place.

    Parameters and their names stay, so that an optimizer, a checkpoint and `save_pretrained` see
    the same adapter. With a subspace the gradient is projected off it wherever a module writes to
    the residual stream, and adapters there are kept closed. A warning names the layers that have to
    stay with peft: their gradient is projected, but their factors are not closed. Call it again
    after adding an adapter on other modules, or loading trained weights to be closed.
    docs/compatibility.md has all cases.

    Args:
        model: a `PeftModel`, or any module with peft's LoRA layers in it.
        config: the options; None: the fast layers, and no projection.

    Returns:
        The layers that were replaced and those that were not; it prints as a table.

    Raises:
        TypeError: not a model, or not a config.
        ValueError: no LoRA layers or an unknown backend. With a subspace also: a subspace of
            another model, an unknown architecture, weights sharded in an unsupported way, and with
            `orthogonal` adapters that hold a part of the pretrained weights (PiSSA and the like)
            or trained weights or biases of writers, of norms after them or of embeddings.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}: give a peft model.")
    config = GraspConfig() if config is None else config
    if not isinstance(config, GraspConfig):
        raise TypeError(f"The config is a {type(config).__name__}: give GraspConfig(...).")
    subspace = _subspace(config.subspace)
    report = replace_lora_layers(
        model, subspace, closed=config.orthogonal, backend=config.backend, sites=config.sites
    )
    setattr(model, _APPLIED, replace(config, subspace=subspace))
    return report


def remove_grasp(model: nn.Module) -> None:
    """Put stock peft layers back in place, with the weights that the model computed with."""
    restore_lora_layers(model)
    if hasattr(model, _APPLIED):
        delattr(model, _APPLIED)


def applied_config(model: Any) -> GraspConfig | None:
    """Return the last config of `apply_grasp` on this model, with its subspace loaded."""
    return getattr(model, _APPLIED, None)


def _subspace(given: Subspace | str | PathLike[str] | None) -> Subspace | None:
    """Load a subspace of its file, or identify it in the folder of an adapter."""
    if isinstance(given, str | PathLike):
        path = fspath(given)
        return Subspace.load(path) if is_subspace(path) else identify(path)
    check_subspace(given)
    return given


def lora_layers(model: nn.Module) -> dict[str, tuple[type, tuple[str, ...]]]:
    """Return class and adapters of every LoRA layer by its name, to see whether they changed."""
    return {
        base_name(name): (type(module), tuple(sorted({**module.lora_A, **module.lora_embedding_A})))
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
