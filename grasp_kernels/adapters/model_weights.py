"""The weights of a whole model by module name, of a module or of a checkpoint folder.

Shapes: E experts, K in, N out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grasp_kernels.adapters.base_model import read_base_model, read_tensor
from grasp_kernels.adapters.files import CONFIG, indexed
from grasp_kernels.sites import base_name

_TRANSPOSED = ("gpt2",)  # model types whose linear layers store W[K, N]
_EMBEDDINGS = ("wte", "wpe")  # and whose embeddings do not
_WEIGHTS = "model.safetensors"

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
    if (Path(source) / CONFIG).is_file():
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
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 or not name.endswith(".weight"):
            found[base_name(name)] = parameter.detach
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            found[base_name(name)] = partial(_untransposed, module)
    return found


def _of_folder(folder: Path) -> dict[str, Reader]:
    from safetensors import safe_open

    transposed = is_transposed(folder)
    found: dict[str, Reader] = {}
    for file in _files(folder):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                read = partial(read_tensor, file, key)
                name = key.removesuffix(".weight")
                turned = transposed and name != key and not name.endswith(_EMBEDDINGS)
                found[name] = partial(_transpose, read) if turned else read
    return found


def _files(folder: Path) -> list[Path]:
    """Those of the checkpoint; others may lie beside them."""
    index, whole = folder / f"{_WEIGHTS}.index.json", folder / _WEIGHTS
    if index.is_file():
        return indexed(index, "model")
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _refuse_unreadable(folder: Path) -> None:
    """Raise for a checkpoint whose tensors are not the weights of its modules by name."""
    config = folder / "config.json"
    stored = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
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
    known = (Path(source) / "config.json").is_file()
    return known and read_base_model(source).model_type in _TRANSPOSED


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
