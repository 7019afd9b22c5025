"""An adapter that other software reads as peft does: its scaling in its weights, one rank.

What other software does with the parts of an adapter was found by running it on tiny models, for
vLLM and ollama by reading their source.

Shapes: K in, N out, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels.adapters.files import (
    CONFIG,
    WEIGHTS,
    changed_copy,
    find_weights,
    open_weights,
    read_config,
    refuse_variants,
)
from grasp_kernels.adapters.load import CONVERT, adapter_parts, moved_base
from grasp_kernels.files import whole_file, write_json
from grasp_kernels.inert import listed, shown
from grasp_kernels.models.difference import whole_model
from grasp_kernels.models.names import base_name
from grasp_kernels.models.weights import Source

_FOUR = ("vllm", "llama.cpp", "ollama", "openvino")
CONSUMERS = (*_FOUR, "mlx")
_FOLD = "fold it: grasp-kernels fold ADAPTER --output OUT"
_SCALED = "applies another scale than peft, without a word"
_REFUSED, _DROPPED = "refuses it", "leaves it out, without a word"
_WHOLE = (
    "fold it with --base-model BASE, which leaves out unchanged ones, train without "
    "modules_to_save, or merge the adapter into its base"
)
_BIAS = "train without lora_bias"
_MOVED = "a base that its initialisation changed"
# Part of an adapter -> consumer -> what it does with it. Software that is not named reads the part
# as peft does.
_PARTS: dict[str, tuple[str, dict[str, str]]] = {
    _MOVED: (
        CONVERT,
        dict.fromkeys(_FOUR, "adds it to the base as it was, without a word"),
    ),
    "rsLoRA": (_FOLD, dict.fromkeys(("llama.cpp", "ollama"), _SCALED)),
    "alpha_pattern": (_FOLD, dict.fromkeys(_FOUR, _SCALED)),
    "rank_pattern": (_FOLD, dict.fromkeys(("vllm", "openvino"), _SCALED)),
    "biases of lora_B": (_BIAS, {"llama.cpp": _REFUSED, "openvino": _DROPPED}),
    "biases of the base": ("train with bias='none'", {"vllm": _REFUSED}),
    "DoRA": (
        "train with plain LoRA",
        {"vllm": _REFUSED, "llama.cpp": _REFUSED, "openvino": "takes it for plain LoRA"},
    ),
    "trained norms": (_WHOLE, {"vllm": _REFUSED, "llama.cpp": _DROPPED, "openvino": _DROPPED}),
    "whole matrices": (_WHOLE, {"vllm": _REFUSED, "llama.cpp": _REFUSED}),
    "LoRA on the embedding": ("leave it out of target_modules", {"openvino": _DROPPED}),
    "weights of Conv1D": (
        "merge the adapter into its base",
        {"llama.cpp": "turns the update around, without a word"},
    ),
}
_MLX = "mlx-lm reads no folder of peft, only its own format: merge the adapter into its base."
_OPENVINO = (
    "OpenVINO GenAI takes alpha from you, not from the file: AdapterConfig().add(adapter, "
    "alpha={:g}); without it, or with add_request, the scale is another."
)


def fold_scaling(
    adapter_dir: str | PathLike[str], out: str | PathLike[str], *, base: Source | None = None
) -> tuple[str, ...]:
    """Write an adapter with the scaling of each module in its `lora_B`: `lora_alpha = r`.

    The new adapter computes what the old one does, up to the rounding of `lora_B` in its dtype. All
    modules get the largest rank by rows of zeros, so there are no patterns and no rsLoRA.

    Args:
        adapter_dir: adapter folder.
        out: adapter folder to write.
        base: the base model or its folder. Trained modules that are equal to those of the base are
            left out; without a base they stay.

    Returns:
        The names of the weights that were left out.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError, ValueError: no adapter there, or one that cannot be used; a scaled weight
            beyond its dtype.
    """
    source = Path(adapter_dir)
    with changed_copy(source, out) as folder:
        return _fold(source, folder, base)


def fold_in_place(folder: Path) -> None:
    """Fold the scaling of an adapter folder that is being written."""
    _fold(folder, folder, None)


@torch.no_grad()
def _fold(source: Path, folder: Path, base: Source | None) -> tuple[str, ...]:
    from safetensors.torch import save_file

    parts = adapter_parts(source)
    if start := moved_base(parts.config):
        raise ValueError(
            f"{str(source)!r} was initialised with {start!r}, so "
            "peft changes the base by its rank and scaling when it loads the adapter, and another "
            f"rank or scaling would be another model; {CONVERT}, and fold that."
        )
    R = max(entry.lora_A.shape[-2] for entry in parts.factors)
    tensors: dict[str, Tensor] = {}
    for entry in parts.factors:
        (key_A, key_B, *of_bias), s, more = entry.keys, entry.scaling, R - entry.lora_A.shape[-2]
        tensors[key_A] = _scaled(key_A, entry.lora_A, 1.0, (0, 0, 0, more))
        tensors[key_B] = _scaled(key_B, entry.lora_B, s, (0, more))
        if entry.bias is not None:
            tensors[of_bias[0]] = _scaled(of_bias[0], entry.bias, s, (0, 0))
    read = open_weights(find_weights(source, None))
    others = [key for key in read if key not in tensors]
    same = _unchanged({key: read[key]() for key in others}, base)
    named = parts.config.get("modules_to_save") or []
    # peft loads all that it saves under a name, the end of a path, or nothing.
    changed = [f"{_module(key)}." for key in others if key not in same]
    still = [name for name in named if any(f"{name}." in module for module in changed)]
    same = [key for key in same if not any(f"{name}." in f"{_module(key)}." for name in still)]
    tensors |= {key: read[key]() for key in others if key not in same}
    plain = {"r": R, "lora_alpha": R, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config = {**parts.config, **plain}
    if same and named:
        config["modules_to_save"] = still or None
    with whole_file(folder / WEIGHTS) as partial:  # the tensors may lie in the file of that name
        save_file(tensors, partial, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)
    return tuple(map(_module, same))


def _module(key: str) -> str:
    return base_name(key).removesuffix(".weight")


def _scaled(key: str, tensor: Tensor, scaling: float, more: tuple[int, ...]) -> Tensor:
    """Return `s M` in the dtype of `M`, with `more` zeros as for `F.pad`."""
    wide = tensor.double() if tensor.dtype == torch.float64 else tensor.float()
    found = F.pad(wide * scaling, more).to(tensor.dtype)
    if not bool(found.to(wide.dtype).isfinite().all()):
        raise ValueError(
            f"{shown(key)} times its scaling {scaling:g} is beyond {tensor.dtype}; save the "
            "adapter in bfloat16 or float32 first."
        )
    return found.contiguous()


def _unchanged(tensors: Mapping[str, Tensor], base: Source | None) -> list[str]:
    """Return the keys of tensors that are equal to those of the base."""
    if base is None:
        return []
    original = whole_model(base, merged=False)
    return [
        key
        for key, tensor in tensors.items()
        if (read := original.get(_module(key))) is not None
        and (theirs := read()).shape == tensor.shape
        and torch.equal(theirs.to(tensor.dtype), tensor)
    ]


def consumer_problems(adapter_dir: str | PathLike[str], consumer: str) -> list[str]:
    """Return what other software does differently from peft, a sentence each.

    Args:
        adapter_dir: adapter folder.
        consumer: one of `CONSUMERS`.

    Raises:
        FileNotFoundError, ValueError: no adapter there, or an unknown consumer.
    """
    if consumer not in CONSUMERS:
        raise ValueError(
            f"for is {consumer!r}, which is unknown; use one of {', '.join(CONSUMERS)}."
        )
    config, keys = _read(adapter_dir)
    if consumer == "mlx":
        return [_MLX]
    found = []
    for part, where in _parts_of(config, keys):
        remedy, effects = _PARTS[part]
        if consumer in effects:
            named = f" ({listed(where)})" if where else ""
            found.append(f"{part}{named}: {consumer} {effects[consumer]}; {remedy}.")
    return found


def consumer_advice(adapter_dir: str | PathLike[str], consumer: str) -> str | None:
    """Return what to do in other software with an adapter that it can read, or None."""
    if consumer != "openvino":
        return None
    config, _ = _read(adapter_dir)
    factor = config["r"] ** 0.5 if config.get("use_rslora") else 1
    return _OPENVINO.format(config["lora_alpha"] * factor)


def _read(adapter_dir: str | PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration and the keys of an adapter of a form that was tried elsewhere."""
    path = find_weights(Path(adapter_dir), None)
    config = read_config(path)
    refuse_variants(str(path.parent), {**config, "use_dora": False})  # DoRA is known
    if config.get("trainable_token_indices"):
        raise ValueError(
            f"{str(path.parent)!r} has trained tokens (trainable_token_indices), which were not "
            "tried with other software; merge the adapter into its base."
        )
    return config, list(open_weights(path))


def _parts_of(config: Mapping[str, Any], keys: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the parts of an adapter beyond plain LoRA, with their names."""
    r, alpha = config["r"], config["lora_alpha"]
    if start := moved_base(config):
        yield _MOVED, [start]
    if config.get("use_rslora") and {r, *(config.get("rank_pattern") or {}).values()} != {1}:
        yield "rsLoRA", []
    for name, plain in (("alpha_pattern", alpha), ("rank_pattern", r)):
        other = [key for key, value in (config.get(name) or {}).items() if value != plain]
        if other:
            yield name, other
    if config.get("use_dora") or any("lora_magnitude_vector" in key for key in keys):
        yield "DoRA", []
    if config.get("fan_in_fan_out"):
        yield "weights of Conv1D", []
    kinds: dict[str, list[str]] = {}
    for name in map(base_name, keys):
        kind = _kind_of(name)
        if kind is not None:
            kinds.setdefault(kind, []).append(name)
    yield from kinds.items()


def _kind_of(name: str) -> str | None:
    """Return the part that a tensor of an adapter is of, or None for a plain factor."""
    if ".lora_embedding_" in name or ".embed_tokens.lora_" in f".{name}":
        return "LoRA on the embedding"
    if ".lora_B" in name and name.endswith(".bias"):
        return "biases of lora_B"
    if ".lora_" in name:
        return None
    if name.endswith(".bias"):
        return "biases of the base"
    module = name.removesuffix(".weight").rpartition(".")[2]
    return "trained norms" if "norm" in module else "whole matrices"
