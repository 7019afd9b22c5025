"""The weights of a whole model by module name, of a module or of a checkpoint folder.

Each weight is read on request: a 70B checkpoint costs only the weights in use.

Shapes: D width of the residual stream, E experts, K in, N out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.files import inside, read_json
from grasp_kernels.inert import shown
from grasp_kernels.models.names import base_name, expert_part, same_module, stored_name
from grasp_kernels.models.sharding import whole
from grasp_kernels.models.tensors import read_folder, refuse_nonfinite

_TRANSPOSED = ("gpt2",)  # model types whose linear layers store W[K, N]
_EMBEDDINGS = ("wte", "wpe")  # and whose embeddings do not
HEAD, _OF_NEOX = "lm_head", "embed_out"  # GPT-NeoX's name of its head in files

Reader = Callable[[], Tensor]
Source = nn.Module | str | PathLike[str]


@dataclass(frozen=True)
class BaseModel:
    """Hold the base model for the checks of an adapter; without weights nothing is known of it.

    `weights` reads each by its name.
    """

    model_type: str | None = None
    width: int | None = None  # of the residual stream
    weights: Mapping[str, Reader] = field(default_factory=dict)
    source: str | None = None

    def has(self, name: str) -> bool:
        """Say whether the base has a module or parameter, as far as its weights are known."""
        part = expert_part(name)
        names = (name, part.whole if part else name)
        return not self.weights or any(same_module(one, self.weights) for one in names)

    def norm_weight(self, norm: str, width: int) -> Tensor | None:
        """Return the weight `[D]` of a norm by its module name, None if the base has no weights.

        Raises:
            ValueError: the base has no such norm, or one of another width or with values that are
                not finite.
        """
        if not self.weights:
            return None
        name = same_module(norm, self.weights)
        if name is None:
            raise ValueError(
                f"The base model {shown(self.source)} has no norm {shown(norm)}, through which the "
                "adapter writes; give the base model that the adapter was trained on."
            )
        weight = whole(self.weights[name]())
        if weight.is_meta:
            return None
        if weight.shape != (width,):
            raise ValueError(
                f"The norm {shown(norm)} of the base model {shown(self.source)} has width "
                f"{weight.numel()}, but the adapter writes {width}; give the adapter's base model."
            )
        refuse_nonfinite(norm, weight)
        return weight.clone()


def read_base_model(source: Source | None) -> BaseModel:
    """Describe the base model given as a module, a checkpoint folder, or None (nothing is known).

    Raises:
        FileNotFoundError: the folder does not exist or has no config.json.
        ValueError: its files cannot be read.
    """
    if source is None:
        return BaseModel()
    if isinstance(source, nn.Module):
        config: Any = getattr(source, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(text, "hidden_size", None)
        return BaseModel(model_type_of(source), width, model_weights(source), type(source).__name__)
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The base model {str(folder)!r} has no config.json; give a checkpoint or a model."
        )
    stored = model_config(folder)
    nested = stored.get("text_config")
    text = nested if isinstance(nested, dict) else stored
    width = text.get("hidden_size", text.get("n_embd"))
    return BaseModel(stored.get("model_type"), width, model_weights(folder), str(folder))


def model_weights(source: Source) -> dict[str, Reader]:
    """Return a reader for the weight `[N, K]` of each module, by its name in the base model.

    For fused experts it reads `[E, N, K]`, by the name of the parameter. Other tensors, such as
    biases, have their whole name.

    Raises:
        FileNotFoundError, ValueError: a shard is missing; tensors that are not those of one model.
    """
    return _of_module(source) if isinstance(source, nn.Module) else _of_folder(Path(source))


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
    return HEAD if name == _OF_NEOX else name


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
                f"The checkpoint {str(folder)!r} holds {shown(name)} twice; save the model again."
            )
        turned = transposed and key.endswith(".weight") and not name.endswith(_EMBEDDINGS)
        found[name] = partial(_transpose, read) if turned else read
    for name, parts in experts.items():
        count, places = max(e for e, _ in parts) + 1, max(place for _, place in parts) + 1
        if name in found or len(parts) != count * places:
            raise ValueError(
                f"The checkpoint {str(folder)!r} has only {len(parts)} of the {count * places} "
                f"weights of {shown(name)}; give a complete one."
            )
        rows = [[parts[e, place] for place in range(places)] for e in range(count)]
        found[name] = partial(_stacked, rows)
    return found


def _stacked(experts: list[list[Reader]]) -> Tensor:
    """Stack weights stored expert by expert to `[E, N, K]`, as in the modules."""
    return torch.stack([torch.cat([read() for read in places]) for places in experts])


def is_transposed(source: Source) -> bool:
    """Say whether the linear layers of a model store `W[K, N]`."""
    if isinstance(source, nn.Module):
        return any(hasattr(module, "nf") for module in source.modules())
    return model_type_of(source) in _TRANSPOSED


def model_type_of(source: Source) -> str | None:
    """Return the model type in the configuration of a model or its folder."""
    if isinstance(source, nn.Module):
        return getattr(getattr(source, "config", None), "model_type", None)
    return model_config(Path(source)).get("model_type")


def model_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint folder, empty where there is none.

    Raises:
        ValueError: it cannot be read, or its model type is not a name.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    again = "copy it again from the checkpoint"
    config = read_json(inside(path), "configuration of a model", again)
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"{str(path)!r} says model_type={shown(kind)}, which is no name; {again}.")
    return config


def _untransposed(module: Any) -> Tensor:
    weight = module.weight.detach()
    return weight.mT if hasattr(module, "nf") else weight  # transformers' Conv1D stores [K, N]


def _transpose(read: Reader) -> Tensor:
    tensor = read()
    return tensor.mT if tensor.ndim == 2 else tensor
