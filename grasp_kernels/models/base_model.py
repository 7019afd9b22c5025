"""What identification needs to know of the base model: type, depth, width, and norm weights.

Read from a module or from a checkpoint folder; of a folder only `config.json` and the norm weights
are read, so that a 70B checkpoint costs megabytes. `D` is the width of the residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grasp_kernels.files import inside, read_json
from grasp_kernels.inert import shown
from grasp_kernels.models.names import base_name, expert_part, same_module, stored_name
from grasp_kernels.models.sharding import whole
from grasp_kernels.models.tensors import Stored, read_folder, refuse_nonfinite

MOST_LAYERS = 1000  # that any model has


@dataclass(frozen=True)
class BaseModel:
    """`names` are those of its modules and parameters, `vectors` maps the module name of a norm to
    a function that reads its weight; both are empty where nothing is known of the base."""

    model_type: str | None = None
    n_layers: int | None = None
    vectors: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    names: Collection[str] = frozenset()
    source: str | None = None
    width: int | None = None  # of the residual stream

    def has(self, name: str) -> bool:
        """Whether the base has what an adapter adapts, as far as its modules are known."""
        return not self.names or same_module(name, self.names) is not None

    def norm_weight(self, norm: str, width: int) -> Tensor | None:
        """The weight `[D]` of a norm by its module name, None if no norm of the base is at hand.

        Raises:
            ValueError: the base has no such norm, or one of another width or with values that are
                not finite.
        """
        if not self.vectors:
            return None
        name = same_module(norm, self.vectors)
        if name is None:
            raise ValueError(
                f"The base model {shown(self.source)} has no norm {shown(norm)}, through which "
                "the adapter writes; give the base model on which the adapter was trained."
            )
        weight = self.vectors[name]()
        if weight.shape != (width,):
            raise ValueError(
                f"The norm {shown(norm)} of the base model {shown(self.source)} has width "
                f"{weight.numel()}, but the adapter writes {width}; give the base model on which "
                "the adapter was trained."
            )
        refuse_nonfinite(norm, weight)
        return weight


def read_base_model(source: nn.Module | str | PathLike[str] | None) -> BaseModel:
    """Describe the base model given as a module, a checkpoint folder, or None (nothing is known).

    Raises:
        FileNotFoundError: the folder does not exist or has no config.json.
        ValueError: its files cannot be read.
    """
    if source is None:
        return BaseModel()
    if isinstance(source, nn.Module):
        return _from_module(source)
    return _from_folder(Path(source))


def _from_module(model: nn.Module) -> BaseModel:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vectors = {
        base_name(name).removesuffix(".weight"): partial(_copy, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)  # repeated layers
        if parameter.ndim == 1 and name.endswith(".weight") and not parameter.is_meta
    }
    return BaseModel(
        getattr(config, "model_type", None),
        getattr(text, "num_hidden_layers", None),
        vectors,
        _modules(base_name(name) for name, _ in model.named_parameters(remove_duplicate=False)),
        type(model).__name__,
        getattr(text, "hidden_size", None),
    )


def _copy(parameter: Tensor) -> Tensor:
    return whole(parameter).clone()


def _from_folder(folder: Path) -> BaseModel:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The base model {str(folder)!r} has no config.json; give a checkpoint folder or a "
            "model."
        )
    config = model_config(folder)
    stored = read_folder(folder)
    vectors = {
        stored_name(key): one
        for key, one in stored.items()
        if len(one.shape) == 1 and key.endswith(".weight")
    }
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    return BaseModel(
        config.get("model_type"),
        _depth(folder, text.get("num_hidden_layers"), stored),
        vectors,
        _modules(f"{stored_name(key)}.weight" for key in stored),
        str(folder),
        text.get("hidden_size", text.get("n_embd")),
    )


def _modules(parameters: Iterable[str]) -> frozenset[str]:
    """The names of parameters and of the modules that they belong to; of experts, of all in one."""
    found: set[str] = set()
    for name in parameters:
        found |= {name, name.rpartition(".")[0]}
    return frozenset(found | {part.whole for one in found if (part := expert_part(one))})


def _depth(folder: Path, said: Any, stored: Mapping[str, Stored]) -> int | None:
    """The number of blocks: what the configuration says, but no more than there are weights of."""
    if said is None:
        return None
    blocks = [int(number) for key in stored for number in re.findall(r"\.(\d{1,6})\.", key)[:1]]
    if not isinstance(said, int) or isinstance(said, bool) or said < 1:
        wrong = "which must be a whole number of at least 1"
    elif blocks and said > max(blocks) + 1:
        wrong = f"but its weights have {max(blocks) + 1}"
    elif said > MOST_LAYERS:
        wrong = f"which is more than {MOST_LAYERS}"
    else:
        return said
    raise ValueError(
        f"The config.json in {str(folder)!r} says num_hidden_layers={shown(said)}, {wrong}; give "
        "the configuration that belongs to the model."
    )


def model_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder, empty where it has none.

    Raises:
        ValueError: it cannot be read, or its model type is no name.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = read_json(
        inside(path), "configuration of a model", "copy it again from the checkpoint"
    )
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(
            f"{str(path)!r} says model_type={shown(kind)}, which must be a name; copy it again "
            "from the checkpoint."
        )
    return config
