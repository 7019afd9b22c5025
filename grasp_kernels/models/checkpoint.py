"""A checkpoint folder or hub name -> configuration, tokenizer and base model, whole or refused.

The whole package loads base models and tokenizers here. A weight that transformers would draw at
random, leave out or round is an error, and the code of a checkpoint is never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grasp_kernels import processes
from grasp_kernels.cpu import in_fast_dtype
from grasp_kernels.files import read_json
from grasp_kernels.inert import listed, reason
from grasp_kernels.models.sharding import local_part, split_loading
from grasp_kernels.models.tensors import INDEX, Stored, read_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # of a checkpoint
_JSON = ("config.json", "generation_config.json", INDEX)
_TOKENIZER_JSON = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
_TOKENIZER = ("*token*", "vocab*", "*.model")  # the names of its files, of any kind
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_RESTORE = "restore the file, or download the checkpoint again"


def find_checkpoint(model: str | PathLike[str]) -> Path:
    """Find the local folder of a checkpoint; download a hub name unless the hub's cache has it.

    Raises:
        FileNotFoundError: neither a checkpoint folder nor a name that can be fetched.
        ValueError: the folder of an adapter.
    """
    folder = Path(model)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"The folder {model} holds an adapter (adapter_config.json): give a whole model."
            )
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"The folder {model} has no config.json: give a Hugging Face checkpoint folder."
            )
        if not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(
                f"The folder {model} has no .safetensors file: save it with save_pretrained."
            )
        return folder.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        raise FileNotFoundError(
            f"There is no folder {model}, and it cannot be fetched from the Hugging Face hub "
            f"({reason(error)}): give a checkpoint folder or the name of a public model."
        ) from None


def load_config(checkpoint: Path) -> PreTrainedConfig:
    """Return the configuration of a checkpoint folder.

    Raises:
        ValueError: it cannot be read, or belongs to a model with custom code.
    """
    from transformers import AutoConfig

    _check_json(checkpoint, _JSON)
    with reading("config.json", checkpoint):
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == "gguf":
        # A model from a GGUF keeps its name in a saved file; safetensors hold no GGUF.
        del config.quantization_config
    return config


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any(file for part in _TOKENIZER for file in checkpoint.glob(part)):
        raise FileNotFoundError(
            f"The folder {checkpoint} has no tokenizer: save it next to the model with "
            "tokenizer.save_pretrained, or download the whole checkpoint."
        )
    _check_json(checkpoint, _TOKENIZER_JSON)
    with reading("tokenizer", checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        tokenizer("a")  # a value of another kind only fails in use
        return tokenizer


def load_model(
    checkpoint: Path, dtype: str = "auto", where: torch.device | None = None
) -> PreTrainedModel:
    """Load the frozen model in evaluation mode, with every weight of its files.

    Args:
        where: the device, and a whole model; `device()` if None, and in a run that splits models
            a part of every weight.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a file that cannot be read; weights that are missing, left over, of another
            shape, not finite, or integers without a quantization_config.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(checkpoint)
    stored = read_folder(checkpoint)
    split = where is None and processes.is_split()
    parts = split_loading(config) if split else {}
    with reading("model", checkpoint):
        model, told = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
            **parts,
        )
    _refuse_other_weights(checkpoint, told)
    if getattr(config, "quantization_config", None) is None:
        _refuse_integers(checkpoint, stored, {name for name, _ in model.named_parameters()})
    model = (model if split else model.to(where or device())).eval()
    for name, weight in model.named_parameters():
        part = local_part(weight)
        checked = part.numel() > 0 and part.dtype in _CHECKED
        if checked and not torch.stack(part.aminmax()).isfinite().all():
            raise ValueError(
                f"The weight {name} of {checkpoint} is not finite in {weight.dtype}: {_RESTORE}, "
                "or use another dtype."
            )
    return in_fast_dtype(model) if dtype == "auto" else model


def device() -> torch.device:
    """Return the device of this process: a GPU of its own, or else the CPU."""
    own = f"cuda:{processes.local_index()}"
    return torch.device(own if torch.cuda.is_available() else "cpu")


@contextmanager
def reading(what: str, checkpoint: Path) -> Iterator[None]:
    """Raise one sentence in place of transformers' errors on an unreadable checkpoint."""
    try:
        yield
    except Exception as error:  # of its libraries: tokenizers raises bare Exceptions
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"The {what} of {checkpoint} comes with its own code (auto_map), which is not run: "
                "give a checkpoint whose architecture is part of transformers."
            ) from None
        if isinstance(error, (MemoryError, ImportError, torch.OutOfMemoryError)):
            raise
        raise ValueError(
            f"The {what} of {checkpoint} cannot be read ({reason(error)}): {_RESTORE}."
        ) from error


def _check_json(checkpoint: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (checkpoint / name).is_file():
            read_json(checkpoint / name, "part of a checkpoint", _RESTORE)


def _refuse_other_weights(checkpoint: Path, told: dict[str, Any]) -> None:
    """Raise unless the files had the weights of the model, and no others."""
    mismatched = [f"{key} {tuple(a)} for {tuple(b)}" for key, a, b in told["mismatched_keys"]]
    odd = {
        "lack": sorted(told["missing_keys"]),
        "also have": sorted(told["unexpected_keys"]),
        "have in another shape": sorted(mismatched),
        "say": [str(message) for message in told.get("error_msgs", ())],
    }
    parts = [f"{what} {listed(names, most=3)}" for what, names in odd.items() if names]
    if parts:
        raise ValueError(
            f"The weights of {checkpoint} are not those of its config.json: they "
            f"{', and '.join(parts)}; complete the download, or give their own config.json."
        )


def _refuse_integers(checkpoint: Path, stored: Mapping[str, Stored], parameters: set[str]) -> None:
    """Raise for integer weights without a conversion back to floats."""
    found = [
        f"{name} ({one.dtype})"
        for name, one in stored.items()
        if one.dtype not in _FLOATS and (name.endswith("weight") or name in parameters)
    ]
    if found:
        raise ValueError(
            f"The weights of {checkpoint} are quantised, and its config.json has no "
            f"quantization_config: {listed(found, most=3)}; give it in 16 or 32 bits."
        )
