"""`grasp-kernels bench`: find the fastest backend on this machine."""

from __future__ import annotations

import argparse
from inspect import signature
from typing import Any


def add_bench(commands: Any, common: argparse.ArgumentParser) -> None:
    bench = commands.add_parser(
        "bench",
        parents=[common],
        help="time stock peft and each backend side by side, to choose one",
        description="Check every backend against float64, then time forward and backward of the "
        "linear layers of a known model, stock peft and all backends in turn.",
    )
    for name, kind, what in (
        ("--model", str, "whose shapes (default: llama-3.1-8b; on a CPU qwen2.5-0.5b)"),
        ("--dtype", str, "float32, float16 or bfloat16 (default)"),
        ("--tokens", int, "of a call (default: 8192; on a CPU 512)"),
        ("--rank", int, "of the adapter (default: 16)"),
        ("--basis", int, "size of the write basis, 0 for none (default: 4)"),
        ("--seconds", float, "that each is measured, at least (default: 0.5)"),
        ("--device", str, "cpu or cuda (default, where there is one)"),
    ):
        bench.add_argument(name, type=kind, help=what)
    bench.set_defaults(command=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from grasp_kernels.bench import Refusal, compare, report

    given = {name: getattr(arguments, name) for name in signature(compare).parameters}
    chosen = {name: value for name, value in given.items() if value is not None}
    timed = list(tqdm(compare(**chosen), desc="benchmark", unit="layer"))
    print(report(timed))
    found = [time for line in timed for time in line.found.values()]
    return int(any(isinstance(t, Refusal) and t.kind in ("wrong", "failed") for t in found))
