"""`grasp-kernels bench`: find the fastest backend on this machine."""

import argparse
from inspect import signature
from typing import Any

from grasp_kernels.cli.options import add_command
from grasp_kernels.progress import bar


def add_bench(commands: Any) -> None:
    bench = add_command(
        commands, "bench", _bench, "time stock peft and every backend, to choose a backend"
    )
    for name, kind, what in (
        (
            "--model",
            str,
            "model with the shapes of the layers (default: llama-3.1-8b; on a CPU qwen2.5-0.5b)",
        ),
        ("--dtype", str, "dtype: float32, float16 or bfloat16 (default: bfloat16)"),
        ("--tokens", int, "tokens in a call (default: 8192; on a CPU 512)"),
        ("--rank", int, "rank of the adapter (default: 16)"),
        ("--basis", int, "number of directions that are projected, 0 for none (default: 4)"),
        ("--seconds", float, "least time to measure each of them (default: 0.5)"),
        ("--device", str, "cpu or cuda (default: cuda if there is a GPU)"),
    ):
        bench.add_argument(name, type=kind, help=what)


def _bench(arguments: argparse.Namespace) -> int:
    """Check every backend against float64.

    Then time the forward and backward passes of a model's linear layers with stock peft and with
    all backends, in turn.
    """
    from grasp_kernels.bench import Refusal, compare, report

    given = {name: getattr(arguments, name) for name in signature(compare).parameters}
    chosen = {name: value for name, value in given.items() if value is not None}
    timed = list(bar(compare(**chosen), desc="benchmark", unit="layer"))
    print(report(timed))
    found = [time for line in timed for time in line.found.values()]
    return int(any(isinstance(t, Refusal) and t.kind in ("wrong", "failed") for t in found))
