"""Time `grasp_kernels.identify` on adapters of the size of known models, from file to subspace.

    python -m benchmarks.identification --output benchmarks/results/identification.jsonl

The adapters are random but for one direction that all writers share; what is timed does not depend
on it. Shapes: K in, N out, R LoRA rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import grasp_kernels as gk
from benchmarks.kernels.machine import environment
from benchmarks.kernels.shapes import MODELS, Decoder
from benchmarks.kernels.timing import Times
from grasp_kernels.files import whole_file

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(folder: Path, decoder: Decoder, R: int) -> None:
    """An adapter folder in peft's format, float32, on all linears of a decoder."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(decoder.hidden, generator=generator)
    tensors = {}
    for layer in range(decoder.layers):
        for linear in decoder.linears:
            block = "self_attn" if linear.name in _ATTENTION else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{linear.name}"
            A = torch.randn(R, linear.K, generator=generator) / linear.K**0.5
            B = torch.randn(linear.N, R, generator=generator) / 100
            if linear.writes:
                B[:, 0] += shared / 10
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A, B
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": R,
        "lora_alpha": 2 * R,
        "target_modules": [linear.name for linear in decoder.linears],
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def rows(models: list[str], R: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One row a model: seconds to the subspace, median and quantiles."""
    machine = environment(torch.device("cpu"))
    for model in models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_adapter(folder, MODELS[model], R)
            seconds = []
            for _ in range(rounds + 1):  # the first one reads the file from disk
                begin = time.perf_counter()
                subspace = gk.identify(folder)
                seconds.append(time.perf_counter() - begin)
            times = Times.of([1e3 * s for s in seconds[1:]])
            yield {
                "model": model,
                "R": R,
                "first": seconds[0],
                "seconds": times.median / 1e3,
                "p20": times.p20 / 1e3,
                "p80": times.p80 / 1e3,
                "k": subspace.k,
                **machine,
            }


def main() -> int:
    parser = argparse.ArgumentParser(description="Time identification on adapters of known models.")
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b", "llama-3.1-70b"])
    parser.add_argument("--rank", type=int, default=16, metavar="R")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", metavar="FILE.jsonl")
    arguments = parser.parse_args()
    unknown = [model for model in arguments.models if model not in MODELS]
    if unknown:
        print(f"model {unknown[0]!r} is unknown; use some of {sorted(MODELS)}.", file=sys.stderr)
        return 2
    found = []
    for row in rows(arguments.models, arguments.rank, arguments.rounds):
        found.append(row)
        print(
            f"{row['model']:<14} {row['seconds']:6.2f} s "
            f"({row['p20']:.2f}–{row['p80']:.2f}, first {row['first']:.2f}), k = {row['k']}, "
            f"{row['threads']} threads"
        )
    if arguments.output:
        with whole_file(arguments.output) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
