"""Two models, as modules or checkpoint folders -> their differences, tensor by tensor."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from grasp_kernels.inert import shown
from grasp_kernels.models.names import base_name
from grasp_kernels.models.tensors import refuse_nonfinite
from grasp_kernels.models.weights import HEAD, Reader, Source, model_config, model_weights

_INPUTS = ("embed_tokens", "embed_in", "wte")  # a head may be tied to these
_CONSTANTS = ("rotary_emb.inv_freq", "attn.masked_bias")  # stored in older checkpoints
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def whole_model(source: Source, *, merged: bool) -> dict[str, Reader]:
    """Return a reader for each weight of a model without adapters, by its name.

    Raises:
        FileNotFoundError: a folder without safetensors files.
        ValueError: an adapter is not merged, or merged where none is wanted; the folder of an
            adapter, or of a quantised or multimodal checkpoint.
    """
    if isinstance(source, nn.Module):
        for name, module in source.named_modules():
            if getattr(module, "lora_A", None) and getattr(module, "merged", merged) != merged:
                state = "not merged; give a model with merged adapters"
                if not merged:
                    state = "merged; give a base model without adapters"
                raise ValueError(f"the adapter of {base_name(name)!r} is {state}.")
        return model_weights(source)
    folder = Path(source)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{str(source)!r} is an adapter, not a model; give a whole checkpoint.")
    stored = model_config(folder)
    for key, what in (("quantization_config", "quantised"), ("vision_config", "multimodal")):
        if stored.get(key):
            raise ValueError(
                f"The checkpoint {str(folder)!r} is {what}, so its files do not hold the weights "
                "of its layers by name; give an ordinary checkpoint; in Python, load the model "
                "without quantisation and give that."
            )
    found = model_weights(folder)
    if not found:
        raise FileNotFoundError(
            f"There are no weights in {str(source)!r}; give a model or a safetensors checkpoint."
        )
    return found


def compared(
    changed: Mapping[str, Reader], original: Mapping[str, Reader]
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Yield name, changed and original of every tensor, one of each in memory at a time.

    Equal tensors are the same object. A tensor is None for a model without it. Tensors are compared
    in the coarser of their dtypes: a rounding is not a change. Neither is a head that is the
    embedding: not all models store it.

    Raises:
        ValueError: a weight that is not finite, not here, or quantised.
    """
    for name, read in original.items():
        other = read()
        if name in changed:
            one = changed[name]()
            _refuse_uncomparable(name, one, other)
            if one.shape == other.shape:
                coarser = max(one.dtype, other.dtype, key=_coarseness)
                one, other = one.to(other.device, coarser), other.to(coarser)
            yield name, other if torch.equal(one, other) else one, other
        elif not _says_nothing(name, other, changed, original):
            yield name, None, other
    for name in (name for name in changed if name not in original):
        one = changed[name]()
        if not _says_nothing(name, one, changed, original):
            yield name, one, None


def _refuse_uncomparable(name: str, *weights: Tensor) -> None:
    for weight in weights:
        plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
        if not plain or (weight.ndim > 1 and weight.dtype not in _DTYPES):
            raise ValueError(
                f"A weight of {shown(name)} is a {type(weight).__name__} of {weight.dtype} on "
                f"{weight.device}; give models that are loaded whole and not quantised."
            )
        refuse_nonfinite(name, weight)


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _says_nothing(
    name: str, tensor: Tensor, changed: Mapping[str, Reader], original: Mapping[str, Reader]
) -> bool:
    """Say whether a tensor missing in one model is a constant, or a head tied to an embedding."""
    if name.endswith(_CONSTANTS) or (name.endswith(".attn.bias") and tensor.ndim == 4):
        return True
    return name.endswith(HEAD) and any(
        tensor.shape == e.shape and torch.equal(tensor, e.to(tensor))
        for model in (changed, original)
        for other, read in model.items()
        if other.endswith(_INPUTS)
        for e in [read()]
    )
