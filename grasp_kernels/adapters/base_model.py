"""What identification needs to know of the base model: its type, its depth, its norm weights.

Read from a module or from a checkpoint folder; of a folder only `config.json` and the norm weights
are read, so that a 70B checkpoint costs megabytes. `D` is the width of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from grasp_kernels.processes import whole
from grasp_kernels.sites import base_name


@dataclass(frozen=True)
class BaseModel:
    """`vectors` maps the full name of a norm weight to a function that reads it."""

    model_type: str | None = None
    n_layers: int | None = None
    vectors: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    def norm_weight(self, norm: str) -> Tensor | None:
        """The weight `[D]` of a norm by its module name, None if the base model is not at hand.

        A task model and its bare backbone name the same norm differently ("model.layers.0.norm1",
        "layers.0.norm1"), so names may differ by leading components.
        """
        wanted = f"{norm}.weight"
        for name, read in self.vectors.items():
            if name == wanted or name.endswith(f".{wanted}") or wanted.endswith(f".{name}"):
                return read()
        return None


def read_base_model(source: nn.Module | str | PathLike[str] | None) -> BaseModel:
    """Describe the base model given as a module, a checkpoint folder, or None (nothing is known).

    Raises:
        FileNotFoundError: the folder does not exist or has no config.json.
    """
    if source is None:
        return BaseModel()
    if isinstance(source, nn.Module):
        return _from_module(source)
    return _from_folder(Path(source))


def _from_module(model: nn.Module) -> BaseModel:
    config = getattr(model, "config", None)
    vectors = {
        base_name(name): partial(_copy, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and not parameter.is_meta
    }
    return BaseModel(
        getattr(config, "model_type", None), getattr(config, "num_hidden_layers", None), vectors
    )


def _copy(parameter: Tensor) -> Tensor:
    return whole(parameter).clone()


def _from_folder(folder: Path) -> BaseModel:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"The base model {str(folder)!r} has no config.json; give a checkpoint folder or a "
            "model."
        )
    config = json.loads(path.read_text())
    return BaseModel(
        config.get("model_type"), config.get("num_hidden_layers"), _folder_vectors(folder)
    )


def _folder_vectors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each vector in the safetensors files of a checkpoint; none is read yet."""
    from safetensors import safe_open

    vectors: dict[str, Callable[[], Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            vectors.update(
                (name, partial(read_tensor, file, name))
                for name in opened.keys()  # noqa: SIM118
                if len(opened.get_slice(name).get_shape()) == 1
            )
    return vectors


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, the only one that is read."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
