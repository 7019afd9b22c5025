#!/usr/bin/env bash
# llama.cpp's converter of LoRA adapters (in the sdist of llama-cpp-python 0.3.36), with peft 0.21.2, CPU: of an adapter's scaling it
# writes `lora_alpha` alone. With rsLoRA (alpha / sqrt(r)) the file means an update sqrt(r) times too small; with
# `alpha_pattern` a module gets the common alpha. Neither is named, and the exit status is 0. `rank_pattern` comes out right, since
# the loader divides by the rank of each matrix.
#
# peft writes both options into adapter_config.json, which the converter reads. With r = 16, half of today's guides' rank, an
# adapter trained with rsLoRA does a quarter of what it was trained to do. The remedy is to put the scaling into lora_B.
#
# Fails if that changes. Run by hand: bash findings/llama_cpp_converter_takes_rslora_for_lora.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 safetensors numpy sentencepiece
(cd "$folder" && "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36)
tar -xzf "$folder"/llama_cpp_python-0.3.36.tar.gz -C "$folder"
export LLAMA_CPP="$folder/llama_cpp_python-0.3.36/vendor/llama.cpp" WORK="$folder/work"
PYTHONPATH="$LLAMA_CPP/gguf-py" "$python" - <<'PYTHON'
import os
import subprocess
import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

llama_cpp, work = Path(os.environ["LLAMA_CPP"]), Path(os.environ["WORK"])
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
)
LlamaForCausalLM(config).save_pretrained(work / "base")


def scale(name, **options):
    """Of the update of up_proj: as converted, over that of peft."""
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=8, target_modules=["up_proj", "down_proj"], **options)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(work / name)
    out = work / f"{name}.gguf"
    command = [sys.executable, llama_cpp / "convert_lora_to_gguf.py", "--base", work / "base"]
    command += ["--outtype", "f32", "--outfile", out, work / name]
    subprocess.run(command, check=True, capture_output=True)
    read = GGUFReader(out)
    (alpha,) = (float(f.parts[f.data[0]][0]) for k, f in read.fields.items() if k.endswith("lora.alpha"))
    tensors = {t.name: torch.tensor(t.data) for t in read.tensors}
    A, B = (tensors[f"blk.0.ffn_up.weight.lora_{letter}"] for letter in "ab")
    found = alpha / len(A) * (B @ A)  # as llama.cpp's loader does
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    meant = layer.get_delta_weight("default").detach()
    factor = float((found * meant).sum() / (meant * meant).sum())
    assert torch.allclose(found, factor * meant, rtol=1e-4, atol=1e-5)
    return round(factor, 4)


found = {
    "plain": scale("plain"),
    "rank_pattern": scale("rank", rank_pattern={"up_proj": 4}),
    "rsLoRA": scale("rslora", use_rslora=True),
    "alpha_pattern": scale("alpha", alpha_pattern={"up_proj": 32}),
}
print("converted / peft:", found)
assert found == {"plain": 1.0, "rank_pattern": 1.0, "rsLoRA": 0.25, "alpha_pattern": 0.25}, found
PYTHON
