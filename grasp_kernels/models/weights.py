"""The weights of a whole model by module name, of a module or of a checkpoint folder.

Shapes: E experts, K in, N out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp_kernels.inert import shown
from grasp_kernels.models.base_model import model_config
from grasp_kernels.models.names import base_name, expert_part, stored_name
from grasp_kernels.models.tensors import read_folder, refuse_nonfinite

_TRANSPOSED = ("gpt2",)  # model types whose linear layers store W[K, N]
_EMBEDDINGS = ("wte", "wpe")  # and whose embeddings do not
_INPUTS = ("embed_tokens", "embed_in", "wte")  # what a head may be tied to
_HEAD, _OF_NEOX = "lm_head", "embed_out"  # what GPT-NeoX calls its head in files
_CONSTANTS = ("rotary_emb.inv_freq", "attn.masked_bias")  # which older checkpoints store
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Reader = Callable[[], Tensor]


def model_weights(source: nn.Module | str | PathLike[str]) -> dict[str, Reader]:
    """A function that reads the weight `[N, K]` of a module, by its name in the base model.

    Of a module with fused experts it reads `[E, N, K]`, by the name of the parameter; what is no
    weight, such as a bias, has its whole name.

    Raises:
        FileNotFoundError: a folder without safetensors files.
        ValueError: the folder of an adapter, or of a quantised or multimodal checkpoint.
    """
    if isinstance(source, nn.Module):
        return _of_module(source)
    if (Path(source) / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(source)!r} is an adapter, not a model; give the checkpoint of a whole model."
        )
    _refuse_unreadable(Path(source))
    found = _of_folder(Path(source))
    if not found:
        raise FileNotFoundError(
            f"There are no weights in {str(source)!r}; give a model, or a checkpoint folder with "
            "safetensors files."
        )
    return found


def _of_module(model: nn.Module) -> dict[str, Reader]:
    found: dict[str, Reader] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # repeated layers
        if ".lora_" not in name and (parameter.ndim == 3 or not name.endswith(".weight")):
            found[_named(base_name(name))] = parameter.detach
    for name, module in model.named_modules():
        if ".lora_" not in name and isinstance(getattr(module, "weight", None), Tensor):
            found[_named(base_name(name))] = partial(_untransposed, module)
    return found


def _named(name: str) -> str:
    return _HEAD if name == _OF_NEOX else name


def _of_folder(folder: Path) -> dict[str, Reader]:
    transposed = is_transposed(folder)
    found: dict[str, Reader] = {}
    experts: dict[str, dict[tuple[int, int], Reader]] = {}
    for key, read in read_folder(folder).items():
        name = _named(stored_name(key))
        part = expert_part(name) if key.endswith(".weight") else None
        if part is not None:
            experts.setdefault(part.whole, {})[part.expert, part.place] = read
            continue
        if name in found:
            raise ValueError(
                f"The checkpoint {str(folder)!r} holds two tensors for {shown(name)}; give one "
                "that a library wrote."
            )
        turned = transposed and key.endswith(".weight") and not name.endswith(_EMBEDDINGS)
        found[name] = partial(_transpose, read) if turned else read
    for name, parts in experts.items():
        count, places = max(e for e, _ in parts) + 1, max(place for _, place in parts) + 1
        if name in found or len(parts) != count * places:
            raise ValueError(
                f"The checkpoint {str(folder)!r} has {len(parts)} of the {count * places} weights "
                f"of {shown(name)}; give one that is whole."
            )
        rows = [[parts[e, place] for place in range(places)] for e in range(count)]
        found[name] = partial(_stacked, rows)
    return found


def _stacked(experts: list[list[Reader]]) -> Tensor:
    """`[E, N, K]`, as the modules hold what checkpoints store expert by expert."""
    return torch.stack([torch.cat([read() for read in places]) for places in experts])


def _refuse_unreadable(folder: Path) -> None:
    """Raise for a checkpoint whose tensors are not the weights of its modules by name."""
    stored = model_config(folder)
    for key, what in (("quantization_config", "quantised"), ("vision_config", "multimodal")):
        if stored.get(key):
            raise ValueError(
                f"The checkpoint {str(folder)!r} is {what}, so that its files do not hold the "
                "weights of its layers by name; load it and give the model, not quantised."
            )


def is_transposed(source: nn.Module | str | PathLike[str]) -> bool:
    """Whether the linear layers of a model store `W[K, N]`."""
    if isinstance(source, nn.Module):
        return any(hasattr(module, "nf") for module in source.modules())
    return model_type_of(source) in _TRANSPOSED


def model_type_of(source: nn.Module | str | PathLike[str]) -> str | None:
    """The model type that a model, or the folder of one, gives itself."""
    if isinstance(source, nn.Module):
        return getattr(getattr(source, "config", None), "model_type", None)
    return model_config(Path(source)).get("model_type")


def _untransposed(module: Any) -> Tensor:
    weight = module.weight.detach()
    return weight.mT if hasattr(module, "nf") else weight  # transformers' Conv1D stores [K, N]


def _transpose(read: Reader) -> Tensor:
    tensor = read()
    return tensor.mT if tensor.ndim == 2 else tensor


def check_merged(source: nn.Module | str | PathLike[str], wanted: bool) -> None:
    """Of a model that still has its adapters; a folder holds weights alone.

    Raises:
        ValueError: an adapter is not merged, or where none is wanted, merged.
    """
    for name, module in source.named_modules() if isinstance(source, nn.Module) else ():
        if getattr(module, "lora_A", None) and getattr(module, "merged", wanted) != wanted:
            raise ValueError(
                f"the adapter of {base_name(name)!r} is {'not ' * wanted}merged; give a model with "
                "merged adapters and as base one without (an adapter needs no base)."
            )


class Compared(NamedTuple):
    """A tensor in the changed model and in its base; None in one that does not have it."""

    name: str
    changed: Tensor | None
    original: Tensor | None
    same: bool


def compared(changed: Mapping[str, Reader], original: Mapping[str, Reader]) -> Iterator[Compared]:
    """Every tensor of both models, one of each in memory at a time.

    They are compared in the coarser of their dtypes: a rounding is no change. A head that is the
    embedding, which not all models store, is no change either.

    Raises:
        ValueError: a weight that is not finite, not here, or quantised.
    """
    for name, read in original.items():
        other = read()
        if name in changed:
            one = changed[name]()
            _refuse_uncomparable(name, one, other)
            if one.shape == other.shape:
                one, other = _alike(one.to(other.device), other)
            yield Compared(name, one, other, torch.equal(one, other))
        else:
            yield Compared(name, None, other, _says_nothing(name, other, changed, original))
    for name, read in changed.items():
        if name not in original:
            one = read()
            yield Compared(name, one, None, _says_nothing(name, one, changed, original))


def _refuse_uncomparable(name: str, *weights: Tensor) -> None:
    for weight in weights:
        plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
        if not plain or (weight.ndim > 1 and weight.dtype not in _DTYPES):
            raise ValueError(
                f"A weight of {shown(name)} is a {type(weight).__name__} of {weight.dtype} on "
                f"{weight.device}; give models that are loaded whole and not quantised."
            )
        refuse_nonfinite(name, weight)


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    coarser = max(one.dtype, other.dtype, key=_coarseness)
    return one.to(coarser), other.to(coarser)


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _says_nothing(
    name: str, tensor: Tensor, changed: Mapping[str, Reader], original: Mapping[str, Reader]
) -> bool:
    """Whether a tensor that one model lacks is a constant, or a head that is an embedding."""
    if name.endswith(_CONSTANTS) or (name.endswith(".attn.bias") and tensor.ndim == 4):
        return True
    return name.endswith(_HEAD) and any(
        tensor.shape == e.shape and torch.equal(tensor, e.to(tensor))
        for model in (changed, original)
        for other, read in model.items()
        if other.endswith(_INPUTS)
        for e in [read()]
    )
