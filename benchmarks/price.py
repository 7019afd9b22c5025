"""The price of `run`: its processor time and peak memory, of those of the naive fine-tune.

    python -m benchmarks.price --model FOLDER --data FILE [--layer-of MODEL] [--max-steps 48]
        [--rows FILE]

The naive fine-tune makes all steps and nothing else. Each part is a process of its own with one
thread. With fewer steps a run makes up fewer chats; the answers of the report are a fixed part,
which weighs more in fewer steps. With `--layer-of` the model is one decoder layer with
random weights, behind the tokenizer of FOLDER. The rows of the model in the file are written again,
without `--rows` those in `results/price.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.decoder import one_layer_model
from benchmarks.kernels.machine import environment
from benchmarks.kernels.rows import Row, write_rows
from benchmarks.kernels.shapes import MODELS
from grasp_kernels import RunConfig, run
from grasp_kernels.files import about
from grasp_kernels.models.checkpoint import load_tokenizer
from grasp_kernels.pages.markdown import table

ROWS = Path(__file__).parent / "results" / "price.jsonl"
ALL = 1_000_000  # steps
PARTS = {
    "naive fine-tune": ALL,
    "run": None,
    "run, with the whole naive training": ALL,
}
_BATCH, _RATE = 8, 1e-3  # as in quality/smollm2


def measure(part: str, config: RunConfig) -> None:
    """Do a part in this process, and print its seconds and bytes."""
    torch.set_num_threads(1)
    start = time.process_time()
    if part == "naive fine-tune":
        from grasp_kernels.pipeline.inputs import prepare
        from grasp_kernels.pipeline.training import train

        folder = Path(config.output)
        with about(config.data, config.model):
            inputs = prepare(config, Path(config.model))
        train(config, inputs, out=folder / "naive", work=folder / "work", description="naive")
    else:
        run(config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.process_time() - start, "bytes": peak}))


def write_layer(name: str, tokenizer: Any, folder: Path) -> None:
    """Write the checkpoint of a model of one decoder layer."""
    decoder = MODELS[name]._replace(vocabulary=len(tokenizer))
    one_layer_model(decoder, torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows(
    name: str, model: Path, data: str, max_steps: int, parts: Iterable[str] = tuple(PARTS)
) -> Iterator[Row]:
    """One row a part."""
    machine = environment(torch.device("cpu"))
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.price"]
            command += ["--model", str(model), "--data", data]
            command += ["--max-steps", str(max_steps), "--part", part, "--output", f"{folder}/out"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        yield {"part": part, "max_steps": max_steps, "model": name, **found, **machine}


def report(found: Iterable[Row]) -> str:
    """A table of minutes and GiB, with their ratios to the naive fine-tune of the model."""
    lines = []
    found = list(found)
    for row in found:
        naive = next(
            r for r in found if (r["model"], r["part"]) == (row["model"], next(iter(PARTS)))
        )
        minutes = f"{row['seconds'] / 60:.1f} ({row['seconds'] / naive['seconds']:.2f})"
        memory = f"{row['bytes'] / 2**30:.2f} ({row['bytes'] / naive['bytes']:.2f})"
        lines.append([row["model"], row["part"], minutes, memory])
    return table(["model", "", "minutes of one core", "peak memory, GiB"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--layer-of", choices=MODELS, help="sizes of one layer, as the model")
    parser.add_argument("--max-steps", type=int, default=48, metavar="N")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE")
    parser.add_argument("--part", choices=PARTS, help="do this part alone, in this process")
    parser.add_argument("--output", metavar="FOLDER", help="where that part is done")
    options = parser.parse_args()
    if options.part is None:
        with tempfile.TemporaryDirectory() as folder:
            model, name = Path(options.model), Path(options.model).name
            if options.layer_of:
                name = f"a layer of {options.layer_of}"
                write_layer(
                    options.layer_of, load_tokenizer(model), model := Path(folder) / "layer"
                )
            found = list(rows(name, model, options.data, options.max_steps))
        lines = options.rows.read_text("utf-8").splitlines() if options.rows.exists() else []
        others = [row for row in map(json.loads, lines) if row["model"] != name]
        write_rows(options.rows, [*others, *found])
        print(report(found))
        return
    config = RunConfig(
        model=options.model,
        data=options.data,
        output=options.output,
        max_steps=options.max_steps,
        naive_steps=PARTS[options.part],
        per_device_train_batch_size=_BATCH,
        learning_rate=_RATE,
        lr_scheduler_type="constant_with_warmup",
        dtype="bfloat16",
    )
    measure(options.part, config)


if __name__ == "__main__":
    main()
