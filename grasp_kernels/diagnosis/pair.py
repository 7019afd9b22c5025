"""Folders and modules -> a base model and its adapter, lent for measuring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from grasp_kernels.effect.pair import Pair
from grasp_kernels.identification.frozen_model import measuring
from grasp_kernels.run.checkpoint import find_checkpoint, load_model
from grasp_kernels.run.stream import blocks_by_layer
from grasp_kernels.sites import SiteRules, model_rules


@contextmanager
def open_pair(
    model: nn.Module | str | PathLike[str],
    adapter: str | PathLike[str] | None,
    *,
    sites: SiteRules | None = None,
    dtype: str = "auto",
) -> Iterator[Pair]:
    """Lend base model and adapter for measuring: frozen, in eval mode, put back afterwards.

    Args:
        model: PeftModel with the adapter in it, or the base model (module, folder or hub name).
        adapter: adapter folder; None where the model holds it.

    Raises:
        ValueError, TypeError: no adapter or two, a merged one, an adapter of another model.
    """
    loaded: Any = (
        model if isinstance(model, nn.Module) else load_model(find_checkpoint(str(model)), dtype)
    )
    inside = hasattr(loaded, "disable_adapter") and hasattr(loaded, "peft_config")
    if inside == (adapter is not None):
        raise ValueError(
            f"The model is a {type(loaded).__name__} and the adapter {str(adapter)!r}: give the "
            "plain base model and an adapter folder, or a PeftModel alone; extract_adapter makes "
            "an adapter folder of a merged or fully fine-tuned model."
        )
    with measuring(loaded), _adapted(loaded, adapter) as wrapped:
        _check(wrapped)
        rules = model_rules(wrapped, sites)
        base = wrapped.get_base_model()
        if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
            raise TypeError(
                f"{type(base).__name__} has no unembedding to read directions with: give a causal "
                "language model of transformers."
            )
        yield Pair(wrapped, rules, blocks_by_layer(base, rules))


@contextmanager
def _adapted(loaded: Any, adapter: str | PathLike[str] | None) -> Iterator[Any]:
    """The model with an adapter of a folder in it for a while, also where that does not fit."""
    if adapter is None:
        yield loaded
        return
    wrapped = None
    try:
        wrapped = _with_adapter(loaded, adapter)
        yield wrapped.eval()
    finally:
        if wrapped is not None:
            wrapped.unload()
        for name, module in list(loaded.named_modules()):  # where peft has stopped on the way
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(loaded.get_submodule(parent), child, module.get_base_layer())


def _with_adapter(base: nn.Module, adapter: str | PathLike[str]) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(adapter))
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The adapter {str(adapter)!r} does not fit the base model ({first}): give the base "
            "model that it was trained on."
        ) from error


def _check(model: Any) -> None:
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"The model has the active adapters {active}: activate the one to look at with "
            "set_adapter."
        )
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ValueError(
            f"The adapter {active[0]!r} is merged into the base weights, so that it cannot be "
            "switched off: call model.unmerge_adapter() first."
        )
