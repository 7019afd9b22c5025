"""A peft model and a config -> the same model on GraspLoRALinear, and back."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any, NamedTuple

from torch import nn

from grasp_kernels.config import GraspConfig
from grasp_kernels.layers.replacement import (
    Replacement,
    replace_lora_layers,
    restore_lora_layers,
)
from grasp_kernels.subspace import Subspace, check_subspace, identify
from grasp_kernels.subspace.basis import is_subspace

_APPLIED = "_grasp"  # attribute of a model with what was applied


class Applied(NamedTuple):
    """A config, its subspace where it named a file or an adapter, and what was replaced."""

    config: GraspConfig
    subspace: Subspace | None
    report: Replacement


def apply_grasp(model: nn.Module, config: GraspConfig | None = None) -> Replacement:
    """Put the LoRA layers of a peft model on GraspLoRALinear, in place.

    Parameters and their names stay, so that an optimizer, a checkpoint and `save_pretrained` see
    the same adapter. With a subspace the gradient is projected off it. A layer that has to stay
    with peft is warned of, and reported with the reason. Calling it again starts afresh.

    Args:
        model: a `PeftModel`, or any module with peft's LoRA layers in it.
        config: the options; None: the fast layers, and no projection.

    Returns:
        What was replaced, and what was not; it prints as a table.

    Raises:
        ValueError: no LoRA layers, a subspace of another model, an architecture that is not known,
            or adapters that cannot be kept orthogonal; `replace_lora_layers` has the list.
    """
    return apply(model, config or GraspConfig()).report


def apply(model: Any, config: GraspConfig) -> Applied:
    """Do what `apply_grasp` does, and return all of it."""
    subspace = _subspace(config.subspace)
    report = replace_lora_layers(
        model,
        subspace,
        closed=config.orthogonal,
        backend=config.backend,
        sites=config.architecture,
    )
    done = Applied(config, subspace, report)
    setattr(model, _APPLIED, done)
    return done


def remove_grasp(model: nn.Module) -> None:
    """Put stock peft layers back in place, with the weights that the model computed with."""
    restore_lora_layers(model)
    if hasattr(model, _APPLIED):
        delattr(model, _APPLIED)


def applied(model: Any) -> Applied | None:
    """What `apply_grasp` last did to a model, if anything."""
    return getattr(model, _APPLIED, None)


def _subspace(given: Any) -> Subspace | None:
    """A subspace as it is, of its file, or of the folder of an adapter."""
    if not isinstance(given, str | PathLike):
        check_subspace(given)
        return given
    path = fspath(given)
    return Subspace.load(path) if is_subspace(path) else identify(path)
