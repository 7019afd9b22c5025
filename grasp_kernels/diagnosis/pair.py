"""A base model and its adapter in one module: forwards with the adapter on or off.

Only what was asked for leaves a forward: block outputs are seen (and changed) by functions of the
caller, and the unembedding works on chosen positions alone, so that no `[B, T, V]` logits are made.

Shapes: `B` sequences of a batch, `T` tokens of the longest of them, `M` chosen positions, `V`
vocabulary, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from grasp_kernels.identification.frozen_model import Edit, measuring, output_hook, pad
from grasp_kernels.run.inputs import find_checkpoint, load_model
from grasp_kernels.run.stream import find_blocks
from grasp_kernels.sites import SiteRules, model_rules

Position = tuple[int, int]  # (sequence of the batch, token)


@dataclass(frozen=True)
class Pair:
    """`model` is a PeftModel with one active adapter; `blocks` its decoder blocks by layer."""

    model: Any
    rules: SiteRules
    blocks: dict[int, nn.Module]

    @property
    def layers(self) -> list[int]:
        return list(self.blocks)

    @property
    def base(self) -> Any:
        """The module of transformers inside, which runs with the adapter unless it is off."""
        return self.model.get_base_model()

    def switched(self, adapter: bool) -> Any:
        """Context in which the adapter is on or off."""
        return nullcontext() if adapter else self.model.disable_adapter()

    def log_probs(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Position],
        *,
        adapter: bool,
        edits: Mapping[int, Edit] | None = None,
    ) -> Tensor:
        """Float32 `[M, V]`: log probabilities of the next token at the chosen positions."""
        ids, mask = pad(self.base, sequences, "right")
        rows, columns = (torch.tensor(index) for index in zip(*positions, strict=True))

        def choose(_head: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            return inputs[0][rows.to(inputs[0].device), columns.to(inputs[0].device)]

        head = self.base.get_output_embeddings()
        with ExitStack() as stack:
            stack.enter_context(self.switched(adapter))
            stack.callback(head.register_forward_pre_hook(choose).remove)
            for layer, edit in (edits or {}).items():
                hook = output_hook(edit)
                stack.callback(self.blocks[layer].register_forward_hook(hook).remove)
            logits = self.base(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits.float().log_softmax(dim=-1)


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
            "plain base model and an adapter folder, or a PeftModel alone; a merged model holds no "
            "adapter that could be switched off."
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
        _, blocks = find_blocks(base, rules)
        yield Pair(wrapped, rules, dict(enumerate(blocks)))


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
