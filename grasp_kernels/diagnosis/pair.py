"""A base model and its adapter in one module, lent for measuring: the adapter is on or off.

The unembedding works on the chosen positions alone, so that no `[B, T, V]` logits are made.

Shapes: `B` sequences of a batch, `T` tokens of the longest sequence, `M` chosen positions, `V`
vocabulary.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.adapters.load import active_adapter, adapter_parts, moved_base
from grasp_kernels.inert import listed, printable, shown
from grasp_kernels.models.checkpoint import find_checkpoint, load_model
from grasp_kernels.models.frozen_model import head_at, measuring, pad
from grasp_kernels.models.names import base_name, same_module
from grasp_kernels.models.tensors import refuse_nonfinite

Position = tuple[int, int]  # (sequence of the batch, token)


@dataclass(frozen=True)
class Pair:
    """PeftModel with one active adapter, and its base model."""

    model: Any

    @property
    def base(self) -> Any:
        """Model of transformers inside; it runs with the adapter unless that is switched off."""
        return self.model.get_base_model()

    def switched(self, adapter: bool) -> Any:
        """Return a context with the adapter on or off."""
        return nullcontext() if adapter else self.model.disable_adapter()

    def log_probs(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Position], *, adapter: bool
    ) -> Tensor:
        """Return the log probabilities of the next token at the positions, float32 `[M, V]`."""
        ids, mask = pad(self.base, sequences, "right")
        rows, columns = (torch.tensor(index) for index in zip(*positions, strict=True))
        with self.switched(adapter), head_at(self.base, (rows, columns)):
            logits = self.base(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits.float().log_softmax(dim=-1)


@contextmanager
def open_pair(
    model: nn.Module | str | PathLike[str],
    adapter: str | PathLike[str] | None,
    *,
    dtype: str = "auto",
) -> Iterator[Pair]:
    """Lend base model and adapter for measuring: frozen, in eval mode, put back afterwards.

    Args:
        model: PeftModel with the adapter in it, or the base model (module, folder or hub name).
        adapter: adapter folder; None if `model` holds the adapter.

    Raises:
        ValueError, TypeError: no adapter or two, a merged adapter, an adapter of another model.
    """
    loaded: Any = model
    if not isinstance(model, nn.Module):
        loaded = load_model(find_checkpoint(str(model)), dtype)
    for name, weight in loaded.named_parameters():
        if type(weight) is nn.Parameter and not weight.is_meta:
            refuse_nonfinite(base_name(name), weight)
    inside = hasattr(loaded, "disable_adapter") and hasattr(loaded, "peft_config")
    if inside == (adapter is not None):
        raise ValueError(
            f"The model is a {type(loaded).__name__} and the adapter {str(adapter)!r}: give the "
            "plain base model and an adapter folder, or a PeftModel alone; extract_adapter makes "
            "an adapter folder of a merged or fully fine-tuned model."
        )
    with measuring(loaded), _adapted(loaded, adapter) as wrapped:
        _check(wrapped)
        base = wrapped.get_base_model()
        if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
            raise TypeError(
                f"{type(base).__name__} has no unembedding: give a causal language model."
            )
        yield Pair(wrapped)


@contextmanager
def _adapted(loaded: Any, adapter: str | PathLike[str] | None) -> Iterator[Any]:
    """Lend the model with the adapter of a folder, and restore the model, also after an error."""
    if adapter is None:
        yield loaded
        return
    wrapped = None
    modules = dict(loaded.named_modules())
    try:
        wrapped = _with_adapter(loaded, adapter)
        yield wrapped.eval()
    finally:
        if wrapped is not None:
            wrapped.unload()
        # peft leaves trained copies of whole modules, and after an error the layers made so far.
        for name, module in list(loaded.named_modules()):
            if name in modules and module is not modules[name]:
                parent, _, child = name.rpartition(".")
                setattr(loaded.get_submodule(parent), child, modules[name])


def _with_adapter(base: nn.Module, adapter: str | PathLike[str]) -> Any:
    """Return a PeftModel with every tensor of the adapter in its place.

    The names are looked up here, once, and the layers are made for them: stock peft leaves out
    every tensor that it does not find by its keys.
    """
    from peft import LoraConfig, get_peft_model

    parts = adapter_parts(adapter)
    _refuse_changed_base(parts.source, parts.config)
    if parts.config.get("trainable_token_indices"):
        raise ValueError(
            f"The adapter {str(adapter)!r} has trained tokens (trainable_token_indices), which are "
            "not read from a folder: train without them; in Python, give the PeftModel."
        )
    names = {base_name(name): name for name, _ in base.named_modules() if name}
    places = {entry.name: same_module(entry.name, names) for entry in parts.factors}
    whole = {name: same_module(name.rpartition(".")[0], names) for name in parts.others}
    adapted = set(places.values()) - {None}
    for name in [name for name, place in whole.items() if place in adapted]:
        # peft saves a head or an embedding beside its factors: that is the base model's own.
        _check_copy(adapter, name, parts.others[name](), base, names[str(whole.pop(name))])
    lost = [name for name, place in (places | whole).items() if place is None]
    if lost:
        raise _unfit(adapter, f"the model has no {listed(lost)}")
    ranks = {names[str(places[e.name])]: e.lora_A.shape[-2] for e in parts.factors}
    alphas = {names[str(places[e.name])]: e.scaling * e.lora_A.shape[-2] for e in parts.factors}
    if len(ranks) < len(parts.factors):
        raise _unfit(adapter, "the model has one module for several weights of the adapter")
    rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={re.escape(name): one for name, one in ranks.items() if one != rank},
        alpha_pattern={re.escape(name): one for name, one in alphas.items() if one != alpha},
        target_modules=list(ranks),
        modules_to_save=sorted({names[str(place)] for place in whole.values()}) or None,
        lora_bias=any(entry.bias is not None for entry in parts.factors),
        fan_in_fan_out=bool(parts.config.get("fan_in_fan_out")),
    )
    try:
        wrapped = get_peft_model(base, config)
        config.base_model_name_or_path = parts.config.get("base_model_name_or_path")
        for entry in parts.factors:
            layer: Any = base.get_submodule(names[str(places[entry.name])])
            _copy(layer.lora_A["default"].weight, entry.lora_A)
            _copy(layer.lora_B["default"].weight, entry.lora_B)
            if entry.bias is not None:
                _copy(layer.lora_B["default"].bias, entry.bias)
        for place in set(whole.values()):
            copies: Any = base.get_submodule(names[str(place)])
            stored = {
                name.rpartition(".")[2]: parts.others[name]()
                for name, there in whole.items()
                if there == place
            }
            copies.modules_to_save["default"].load_state_dict(stored)
    except (RuntimeError, ValueError, AttributeError, KeyError) as error:
        raise _unfit(adapter, printable(str(error).strip().splitlines()[-1].strip())) from error
    return wrapped


def _check_copy(
    adapter: str | PathLike[str], name: str, stored: Tensor, base: nn.Module, module: str
) -> None:
    """Raise unless an adapter's copy of a base weight is that weight."""
    weight: Any = getattr(base.get_submodule(module), name.rpartition(".")[2], None)
    same = weight is not None and weight.shape == stored.shape
    if not same or not torch.equal(stored.to(weight), weight.detach()):
        raise _unfit(adapter, f"its {shown(name)} is another one")


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    if parameter.shape != value.shape:
        one, other = tuple(value.shape), tuple(parameter.shape)
        raise ValueError(f"a weight has shape {one} in the adapter and {other} in the model")
    parameter.data.copy_(value)


def _unfit(adapter: str | PathLike[str], why: str) -> ValueError:
    return ValueError(
        f"The adapter {str(adapter)!r} does not fit the base model ({why}): give the base model "
        "that it was trained on."
    )


def _refuse_changed_base(name: str, config: Mapping[str, Any]) -> None:
    """Raise for an adapter that changes the base too: without it the model is not its base."""
    changes = {
        "trained biases of the base": config.get("bias") not in (None, "none"),
        "an initialisation that changes the base": moved_base(config) is not None,
        "repeated layers": bool(config.get("layer_replication")),
    }
    for what, there in changes.items():
        if there:
            raise ValueError(
                f"The adapter {name!r} has {what}, so the model without it is not its base: merge "
                "the adapter, and make a new one of the difference with grasp-kernels extract."
            )


def _check(model: Any) -> None:
    active = active_adapter(model)
    _refuse_changed_base(active, vars(model.peft_config[active]))
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ValueError(
            f"The adapter {active!r} is merged into the base weights, so it cannot be switched "
            "off: call model.unmerge_adapter() first."
        )
