"""Bytes that autograd keeps of a decoder layer for its backward, of stock peft and of ours.

    python -m benchmarks.kept [--rows FILE]

Every storage counts once; parameters and buffers do not count. Bytes do not depend on the machine,
but for the mask of dropout: a CPU keeps it in the dtype of the activations, a GPU in one byte.
Without `--rows` the rows in `results/kept.jsonl` are written again.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.kernels.decoder import decoder_layer
from benchmarks.kernels.machine import environment
from benchmarks.kernels.rows import Row, write_rows
from benchmarks.kernels.shapes import LINEARS, MODELS
from grasp_kernels.layers.replacement import replace_lora_layers
from grasp_kernels.pages.markdown import table

ROWS = Path(__file__).parent / "results" / "kept.jsonl"
MODEL, TOKENS, RANK = "llama-3.1-8b", 512, 16
ADAPTERS = {"bfloat16": "adapter in bfloat16", "float32": "float32 adapter, peft's default"}


def kept(run: Callable[[], Any], *modules: nn.Module) -> int:
    """Bytes that the graph of a call keeps, besides those of parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    found: dict[int, int] = {}
    alive = []  # or a later storage may lie where an earlier one was

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(run())
    return sum(size for place, size in found.items() if place not in own)


def rows() -> Iterator[Row]:
    """One row for each dtype of the adapter, dropout, and peft or ours."""
    machine = environment(torch.device("cpu"))
    base = decoder_layer(MODELS[MODEL], torch.bfloat16, "cpu", RANK, 0)
    x, _ = base.inputs(TOKENS, 0)
    for adapters, dropout in product(ADAPTERS, (0.0, 0.05)):
        config = LoraConfig(r=RANK, target_modules=list(LINEARS), lora_dropout=dropout)
        model = get_peft_model(base._copy(), config, autocast_adapter_dtype=adapters == "float32")
        for layers in ("peft", "grasp"):
            if layers == "grasp":
                replace_lora_layers(model)
            given = x.clone().requires_grad_()
            yield {
                "model": MODEL, "T": TOKENS, "R": RANK, "adapters": adapters, "dropout": dropout,
                "layers": layers, "bytes": kept(lambda m=model, g=given: m(g), model), **machine,
            }  # fmt: skip


def report(found: Iterable[Row]) -> str:
    """A table of MiB and the ratio to peft."""
    cases: dict[tuple[str, float], dict[str, int]] = {}
    for row in found:
        cases.setdefault((row["adapters"], row["dropout"]), {})[row["layers"]] = row["bytes"]
    lines = [
        [
            f"{ADAPTERS[adapters]}{f', dropout {dropout}' if dropout else ''}",
            *(f"{size[name] / 2**20:.1f}" for name in ("peft", "grasp")),
            f"{size['grasp'] / size['peft']:.2f}",
        ]
        for (adapters, dropout), size in cases.items()
    ]
    return table(["", "peft, MiB", "ours, MiB", "ratio"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = list(rows())
    write_rows(options.rows, found)
    print(report(found))


if __name__ == "__main__":
    main()
