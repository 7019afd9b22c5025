"""peft's files: `adapter_config.json` and `adapter_model.safetensors`, perhaps in shards.

Shapes: `R` LoRA rank, `K` inputs and `N` outputs of a linear layer.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from grasp_kernels.files import inside, new_folder, read_json, whole_folder
from grasp_kernels.inert import listed, printable, shown
from grasp_kernels.models.architectures import Site
from grasp_kernels.models.names import base_name
from grasp_kernels.models.tensors import Stored, indexed, read_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # maps each tensor to its shard

# An adapter folder's configuration, card, tokenizer (tokenizer.model, merges.txt).
_COPIED = (".json", ".md", ".jinja", ".model", ".txt")
_LORA_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<kind>weight|bias)$",
    re.DOTALL,  # a name may hold anything
)
_PARTS = ("A", "B", "bias")  # of a module
_DORA = "which also rescales the weights; train with plain LoRA"
# Parts of the keys of variants; a bias or a fully trained module is none.
_REFUSED = {
    "lora_embedding_": "LoRA on an embedding; train without embeddings in target_modules",
    "lora_magnitude_vector": f"a part of DoRA, {_DORA}",
    ".lora_": "part of an unsupported variant of LoRA; train with plain LoRA",
}
_LARGEST_ALPHA = 1e9  # more overflows somewhere
_PATTERN = re.compile(r"\^?[\w.]+")  # a module name, whole or the end of one


@dataclass(frozen=True)
class LoRAWeights:
    """Hold the two factors of one adapted layer, in their stored dtype; errors name them by `keys`.

    `site` is the layer's place in the stream, None if it is not a writer. `gain[D]` is that of the
    norm between the site and the stream, None without a norm or if the gain is unknown. Only
    `load_adapter` knows both. `bias[N]` is that of lora_B; the layer adds it whatever its input,
    and its key is then the third.
    """

    name: str
    site: Site | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    gain: Tensor | None = None
    bias: Tensor | None = None
    keys: tuple[str, ...] = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Parts:
    """Hold every tensor of an adapter: LoRA factors, and readers of other trained tensors."""

    factors: tuple[LoRAWeights, ...]
    others: Mapping[str, Callable[[], Tensor]]
    config: Mapping[str, Any]
    source: str


def find_weights(source: Path, adapter_name: str | None) -> Path:
    """Find the safetensors file of an adapter by folder or file, or the index of its shards."""
    if source.suffix in {".bin", ".pt", ".pth"}:
        raise ValueError(
            f"{str(source)!r} is a pickle, which can run code when it is read; if you trust it, "
            "load it with peft and save it again with save_pretrained, which writes safetensors."
        )
    if source.is_file():
        if source.suffix != ".safetensors" and source.name != INDEX:
            raise ValueError(
                f"{str(source)!r} is not an adapter; give an adapter folder or a .safetensors file."
            )
        return inside(source)
    if not source.is_dir():
        raise FileNotFoundError(
            f"There is no adapter {str(source)!r}; give a local adapter folder (download one from "
            "the hub first)."
        )
    # peft saves the adapter "default" in the folder itself and others in folders of their name
    folder = source if adapter_name in (None, "default") else source / Path(adapter_name or "").name
    for name in (WEIGHTS, INDEX):
        if (folder / name).is_file():
            return inside(folder / name)
    if (folder / "adapter_model.bin").is_file():
        return find_weights(folder / "adapter_model.bin", None)
    # As FSDP saves it, by torch.distributed.checkpoint.
    shard = next((s for pattern in ("*.distcp", "*/*.distcp") for s in source.glob(pattern)), None)
    if shard is not None:
        raise ValueError(
            f"{str(shard.parent)!r} is a sharded checkpoint whose index is a pickle, which can run "
            f"code when it is read; if you trust it, run `accelerate merge-weights {shard.parent} "
            f"OUT`, copy {CONFIG} into OUT and give OUT/model.safetensors."
        )
    nested = sorted(path.parent.name for path in source.glob(f"*/{WEIGHTS}"))
    if nested:
        raise FileNotFoundError(
            f"The folder {str(source)!r} has no {WEIGHTS}, only adapters in subfolders: give the "
            f"folder of one of {nested[:8]}; in Python, adapter_name also selects one."
        )
    if (source / "config.json").is_file() and any(source.glob("model*.safetensors")):
        raise ValueError(
            f"{str(source)!r} is a whole model; extract an adapter from it first: grasp-kernels "
            f"extract {source} --base-model BASE --output ADAPTER."
        )
    raise FileNotFoundError(
        f"The folder {str(source)!r} has no {WEIGHTS}; give a folder of peft's save_pretrained."
    )


@contextmanager
def changed_copy(source: Path, out: str | PathLike[str]) -> Iterator[Path]:
    """Give the folder of a new adapter with all that belongs to an adapter besides its weights.

    Raises:
        FileExistsError: `out` exists.
        ValueError: a file is a link to a place outside of the folder.
    """
    target, folder = new_folder(out), find_weights(source, None).parent
    files = [file for file in folder.iterdir() if file.suffix in _COPIED and file.is_file()]
    files = [inside(file) for file in files if file.name != INDEX]
    with whole_folder(target) as copy:
        for file in files:
            shutil.copy2(file, copy / file.name)
        yield copy


def read_config(weights: Path) -> dict[str, Any]:
    """Read and check the configuration beside the weights of LoRA or of a variant of it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another kind of adapter, or a value that peft does not write.
    """
    path = weights.parent / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {CONFIG} next to {str(weights)!r}; copy it there (it has the rank and "
            "alpha that scale each layer), or give an adapter folder."
        )
    config = read_json(inside(path), "adapter configuration", "save the adapter again")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{str(path)!r} describes a {printable(str(kind or 'foreign'))} adapter; only peft's "
            "LORA is supported."
        )
    for name, (fits, wanted) in _FORMS.items():
        value = config.get(name)
        if (value is not None or name in ("r", "lora_alpha")) and not fits(value):
            raise ValueError(
                f"{str(path)!r} says {name}={shown(value)}, which must be {wanted}; give the "
                "configuration that belongs to these weights, or save the adapter again."
            )
    return config


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < abs(value) <= _LARGEST_ALPHA  # neither nan nor inf


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check of all values of an object."""
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


# The form of each value read here, None aside.
_ALPHA = f"a number other than 0, up to {_LARGEST_ALPHA:g}"
_SWITCH, _NAMES = (_is(bool), "true or false"), (_are_names, "a list of names")
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number of at least 1"),
    "lora_alpha": (_is_alpha, _ALPHA),
    "rank_pattern": (_of(_is_rank), "an object with whole numbers of at least 1"),
    "alpha_pattern": (_of(_is_alpha), f"an object, each value {_ALPHA}"),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), _SWITCH),
    **dict.fromkeys(("target_parameters", "modules_to_save"), _NAMES),
    "base_model_name_or_path": (_is(str), "a name"),
    "auto_mapping": (_of(_is(str, type(None))), "an object with names"),
    "init_lora_weights": (_is(bool, str), "a name or true"),
}


# With any of these set, a layer computes more than base and product of two factors, or the model
# has other layers than its base.
_VARIANTS = (
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "layer_replication",
)


def refuse_other_forms(where: str, config: Mapping[str, Any]) -> None:
    """Raise for a variant of LoRA with a change other than `s B A`."""
    if config.get("use_dora"):
        raise ValueError(f"{where!r} is a DoRA adapter, {_DORA}.")
    variants = [name for name in _VARIANTS if config.get(name)]
    if variants:
        raise ValueError(
            f"{where!r} is an unsupported variant of LoRA ({listed(variants)}); train plain LoRA."
        )


def refuse_variants(where: str, config: Mapping[str, Any]) -> None:
    """Raise for any change beyond a product of two factors for a linear layer."""
    refuse_other_forms(where, config)
    if config.get("target_parameters"):
        raise ValueError(
            f"{where!r} has LoRA on raw parameters ({listed(config['target_parameters'])}); train "
            "with target_modules on linear layers only."
        )


def read_parts(source: Path, adapter_name: str | None = None) -> Parts:
    """Read every tensor of an adapter's files.

    Raises:
        FileNotFoundError, ValueError: no adapter there, or one that cannot be used.
    """
    path = find_weights(source, adapter_name)
    config = read_config(path)
    refuse_variants(str(path.parent / CONFIG), config)
    tensors = open_weights(path)
    pairs, others = _sort_keys(path, tensors, adapter_name)
    where = str(source)
    ranks = _by_pattern(where, config.get("rank_pattern"), pairs, config["r"])
    alphas = _by_pattern(where, config.get("alpha_pattern"), pairs, config["lora_alpha"])
    factors = []
    for name, pair in pairs.items():
        keys = tuple(pair[part] for part in _PARTS if part in pair)
        A, B, *biases = (tensors[key]() for key in keys)
        rank, alpha = ranks[name], alphas[name]
        if A.ndim == 2 and rank != len(A):
            raise ValueError(
                f"{CONFIG} says r={rank}, lora_alpha={alpha} for {shown(name)}, but its lora_A has "
                f"rank {len(A)}; give the configuration that belongs to these weights."
            )
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        bias = biases[0] if biases else None
        factors.append(LoRAWeights(name, None, A, B, scaling, bias=bias, keys=keys))
    trained = {base_name(key): tensors[key] for key in others}
    return Parts(tuple(factors), trained, config, str(source))


def open_weights(path: Path) -> dict[str, Stored]:
    """Return a reader for each tensor of a safetensors file, or of all shards of an index.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a file is not what its name says.
    """
    return read_tensors(indexed(path, "adapter") if path.name == INDEX else [path])


def _sort_keys(
    path: Path, keys: Iterable[str], adapter_name: str | None
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Sort keys into module -> part -> key, and other keys."""
    pairs: dict[str, dict[str, str]] = {}
    adapters: set[str] = set()
    others = []
    for key in sorted(keys):
        match = _LORA_KEY.match(key)
        if match is None or (match["kind"] == "bias" and match["factor"] == "A"):
            if variant := next((what for part, what in _REFUSED.items() if part in key), None):
                raise ValueError(f"{str(path)!r} holds {shown(key)}, {variant}.")
            others.append(key)
            continue
        if match["adapter"]:
            adapters.add(match["adapter"])
            if adapter_name is not None and match["adapter"] != adapter_name:
                continue
        part = "bias" if match["kind"] == "bias" else match["factor"]
        pair = pairs.setdefault(base_name(match["module"]), {})
        if part in pair and len(adapters) < 2:
            raise ValueError(
                f"{str(path)!r} holds {shown(pair[part])} and {shown(key)}, two weights of the "
                "same module; save the adapter again."
            )
        pair[part] = key
    if len(adapters) > 1 and adapter_name is None:
        raise ValueError(
            f"{str(path)!r} holds the adapters {sorted(adapters)}; save one of them alone; in "
            "Python, choose one with adapter_name."
        )
    if not pairs:
        raise ValueError(
            f"{str(path)!r} holds no LoRA weights{f' of {adapter_name!r}' if adapter_name else ''} "
            f"(its tensors are {listed(others) or 'none'}); give an adapter that peft wrote."
        )
    for name, pair in pairs.items():
        missing = [factor for factor in "AB" if factor not in pair]
        if missing:
            raise ValueError(
                f"{str(path)!r} has no lora_{missing[0]} for {shown(name)}; the file is "
                "incomplete, so save the adapter again."
            )
    return pairs, others


def _by_pattern(
    where: str, patterns: Mapping[str, Any] | None, names: Iterable[str], default: Any
) -> dict[str, Any]:
    """Return each module's value, from the first pattern equal to its name or its end.

    A pattern beyond a name is refused: a foreign regular expression may take any time.
    """
    patterns = patterns or {}
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(
                f"{CONFIG} of {where!r} has the pattern {shown(pattern)}, which is not the name "
                "of a module; use module names in rank_pattern and alpha_pattern."
            )

    def fits(pattern: str, name: str) -> bool:
        whole = pattern.removeprefix("^")
        return name == whole or (whole == pattern and name.endswith(f".{pattern}"))

    return {
        name: next((value for pattern, value in patterns.items() if fits(pattern, name)), default)
        for name in names
    }


def config_model_type(config: Mapping[str, Any]) -> str | None:
    """Return the model type in peft's auto_mapping ("transformers.models.llama.modeling_llama")."""
    library = (config.get("auto_mapping") or {}).get("parent_library") or ""
    match = re.match(r"transformers\.models\.(\w+)\.", library)
    return match[1] if match else None
