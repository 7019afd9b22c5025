"""The files that peft writes: `adapter_config.json` and `adapter_model.safetensors`, the latter
perhaps as several shards with an index.

Shapes: `R` LoRA rank, `K` inputs and `N` outputs of a linear layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from grasp_kernels.sites import base_name

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # which of several shards holds which tensor

_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")


@dataclass(frozen=True)
class Factors:
    """An adapted module before its site is known; `key` is how errors call its weights."""

    name: str
    key: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def find_weights(source: Path, adapter_name: str | None) -> Path:
    """The safetensors file of an adapter given by its folder or by the file itself, or the index of
    its shards."""
    if source.suffix in {".bin", ".pt", ".pth"}:
        raise ValueError(
            f"{str(source)!r} is a pickle, which can run code when it is read; load it with peft "
            "where you trust it and save it again with save_pretrained, which writes safetensors."
        )
    if source.is_file():
        if source.suffix != ".safetensors" and source.name != INDEX:
            raise ValueError(
                f"{str(source)!r} is no adapter; give an adapter folder or a .safetensors file."
            )
        return source
    if not source.is_dir():
        raise FileNotFoundError(
            f"There is no adapter {str(source)!r}; give a local adapter folder (download one from "
            "the hub first)."
        )
    # peft saves the adapter "default" in the folder itself and others in folders of their name
    folder = source if adapter_name in (None, "default") else source / str(adapter_name)
    for name in (WEIGHTS, INDEX):
        if (folder / name).is_file():
            return folder / name
    if (folder / "adapter_model.bin").is_file():
        return find_weights(folder / "adapter_model.bin", None)
    _refuse_distributed(source)
    inside = sorted(path.parent.name for path in source.glob(f"*/{WEIGHTS}"))
    if inside:
        raise FileNotFoundError(
            f"The folder {str(source)!r} has no {WEIGHTS} but adapters inside: give adapter_name, "
            f"or the folder, of one of {inside[:8]}."
        )
    _refuse_model(source)
    raise FileNotFoundError(
        f"The folder {str(source)!r} has no {WEIGHTS}; give a folder that peft's save_pretrained "
        "wrote."
    )


def _refuse_distributed(folder: Path) -> None:
    """Raise for a checkpoint of `torch.distributed.checkpoint`, as FSDP saves it."""
    shard = next((s for pattern in ("*.distcp", "*/*.distcp") for s in folder.glob(pattern)), None)
    if shard is not None:
        raise ValueError(
            f"{str(shard.parent)!r} is a sharded checkpoint whose index is a pickle, which can run "
            f"code when it is read; where you trust it, run `accelerate merge-weights "
            f"{shard.parent} OUT`, copy {CONFIG} into OUT and give OUT/model.safetensors."
        )


def _refuse_model(folder: Path) -> None:
    """Raise for the checkpoint of a whole model."""
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{str(folder)!r} is a whole model; make its adapter first: "
            f"grasp-kernels extract {folder} --base-model BASE --output ADAPTER."
        )


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {CONFIG} beside the weights in {str(path.parent)!r}; copy it there, "
            "since rank and alpha are needed for the scale of each layer."
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); save the adapter again.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(
            f"{str(path)!r} describes a {kind or 'foreign'} adapter; only peft's LORA is supported."
        )
    refuse_variants(str(path), config)
    return config


def refuse_variants(where: str, config: Mapping[str, Any]) -> None:
    if config.get("use_dora"):
        raise ValueError(
            f"{where!r} is a DoRA adapter, whose magnitudes also change the weights; train with "
            "use_dora=False."
        )
    if config.get("target_parameters"):
        raise ValueError(
            f"{where!r} has LoRA on raw parameters ({listed(config['target_parameters'])}); train "
            "with target_modules on linear layers only."
        )


@contextmanager
def open_weights(path: Path) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """A reader for each tensor of a safetensors file, or of all shards that an index names.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a file is not what its name says.
    """
    from safetensors import SafetensorError, safe_open

    file = path
    try:
        with ExitStack() as stack:
            tensors: dict[str, Callable[[], Tensor]] = {}
            for file in _shards(path):
                opened = stack.enter_context(safe_open(file, framework="pt"))
                tensors.update((key, partial(opened.get_tensor, key)) for key in opened.keys())  # noqa: SIM118
            yield tensors
    except SafetensorError as error:
        raise ValueError(
            f"{str(file)!r} is no safetensors file ({error}); save the adapter again."
        ) from error


def _shards(path: Path) -> list[Path]:
    return indexed(path, "adapter") if path.name == INDEX else [path]


def indexed(path: Path, what: str) -> list[Path]:
    """The shards that an index names, of an adapter or a model.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: it is no index.
    """
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no index of shards ({error!r}); save the {what} again."
        ) from error
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{str(path)!r} names {listed(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not beside it; copy all shards there."
        )
    return [path.parent / name for name in names]


def read_weights(
    path: Path, config: Mapping[str, Any], adapter_name: str | None
) -> tuple[list[Factors], list[str]]:
    """Read the factors of each module, one tensor at a time, and note what else the file holds."""
    with open_weights(path) as tensors:
        keys, others = _sort_keys(path, tensors, adapter_name)
        scaling = _scaling_from_config(config)
        factors = [
            Factors(
                name,
                pair["A"].replace(".lora_A", ".lora_{}"),
                a := tensors[pair["A"]](),
                tensors[pair["B"]](),
                scaling(name, a.shape[0]),
            )
            for name, pair in keys.items()
        ]
    notes = []
    if others:
        notes.append(f"The file also holds weights that are not LoRA factors: {listed(others)}.")
    return factors, notes


def _sort_keys(
    path: Path, keys: Iterable[str], adapter_name: str | None
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module -> {"A": key, "B": key}, and the keys that are no LoRA factor."""
    pairs: dict[str, dict[str, str]] = {}
    adapters: set[str] = set()
    others = []
    for key in sorted(keys):
        match = _LORA_KEY.match(key)
        if match is None:
            _refuse_key(path, key)
            others.append(key)
            continue
        if match["adapter"]:
            adapters.add(match["adapter"])
            if adapter_name is not None and match["adapter"] != adapter_name:
                continue
        pairs.setdefault(base_name(match["module"]), {})[match["factor"]] = key
    if len(adapters) > 1 and adapter_name is None:
        raise ValueError(
            f"{str(path)!r} holds the adapters {sorted(adapters)}; choose one with adapter_name."
        )
    if not pairs:
        raise ValueError(
            f"{str(path)!r} holds no LoRA weights{f' of {adapter_name!r}' if adapter_name else ''} "
            f"(its tensors are {listed(others) or 'none'}); give an adapter that peft wrote."
        )
    for name, pair in pairs.items():
        if len(pair) == 1:
            missing = "B" if "A" in pair else "A"
            raise ValueError(
                f"{str(path)!r} has no lora_{missing} for {name!r}; the file is not complete, so "
                "save the adapter again."
            )
    return pairs, others


def _refuse_key(path: Path, key: str) -> None:
    """Raise for tensors of LoRA variants; a bias or a fully trained module is only noted."""
    if "lora_embedding_" in key:
        raise ValueError(
            f"{str(path)!r} has LoRA on an embedding ({key!r}), which is not supported; train "
            "without embeddings in target_modules."
        )
    if "lora_magnitude_vector" in key:
        raise ValueError(
            f"{str(path)!r} is a DoRA adapter ({key!r}), whose magnitudes also change the weights; "
            "train with use_dora=False."
        )
    if ".lora_" in key and not key.endswith("lora_B.bias"):
        raise ValueError(
            f"{str(path)!r} holds {key!r}, a variant of LoRA that is not supported; train with "
            "plain LoRA."
        )


def _scaling_from_config(config: Mapping[str, Any]) -> Callable[[str, int], float]:
    """`alpha / r`, for rsLoRA `alpha / √r`; patterns may give each module its own r and alpha."""

    def scaling(name: str, stored_rank: int) -> float:
        rank = _by_pattern(config.get("rank_pattern") or {}, name, config.get("r"))
        alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha"))
        if alpha is None or rank != stored_rank:
            raise ValueError(
                f"{CONFIG} says r={rank}, lora_alpha={alpha} for {name!r}, but its lora_A has rank "
                f"{stored_rank}; give the configuration that belongs to these weights."
            )
        if rank < 1:
            raise ValueError(
                f"{CONFIG} gives {name!r} rank {rank}; a LoRA needs a rank of at least 1, so train "
                "it again."
            )
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scaling


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that is the whole module name or its end, as in peft."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def config_model_type(config: Mapping[str, Any]) -> str | None:
    """The model type in peft's auto_mapping ("transformers.models.llama.modeling_llama")."""
    library = (config.get("auto_mapping") or {}).get("parent_library") or ""
    match = re.match(r"transformers\.models\.(\w+)\.", library)
    return match[1] if match else None


def listed(names: Iterable[str], most: int = 4) -> str:
    known = sorted(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more
