"""`grasp-kernels bench`: which backend is the fastest on this machine."""

from __future__ import annotations

import argparse
from typing import Any


def add_bench(commands: Any, common: argparse.ArgumentParser) -> None:
    bench = commands.add_parser(
        "bench",
        parents=[common],
        help="time stock peft and each backend side by side, to choose one",
        description="Check every backend against float64, then time forward and backward of the "
        "linear layers of a known model, stock peft and all backends in turn.",
    )
    bench.add_argument(
        "--model", metavar="NAME", help="whose shapes, default: llama-3.1-8b (CPU: qwen2.5-0.5b)"
    )
    bench.add_argument("--dtype", help="float32, float16 or bfloat16: bfloat16")
    bench.add_argument(
        "--tokens", type=int, metavar="T", help="of a call, default: 8192 (CPU: 512)"
    )
    bench.add_argument("--rank", type=int, metavar="R", help="of the adapter: 16")
    bench.add_argument("--basis", type=int, metavar="Q", help="size of the basis: 4; 0: none")
    bench.add_argument("--rounds", type=int, help="measurements of each: 15")
    bench.add_argument("--device", help="cpu or cuda: cuda where there is one")
    bench.set_defaults(command=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from grasp_kernels.bench.backends import compare, table
    from grasp_kernels.bench.provider import Refusal

    names = ("model", "dtype", "tokens", "rank", "basis", "rounds", "device")
    given = {name: getattr(arguments, name) for name in names}
    chosen = {name: value for name, value in given.items() if value is not None}
    timed = list(tqdm(compare(**chosen), desc="benchmark", unit="layer"))
    print(table(timed))
    found = [time for line in timed for time in line.found.values()]
    return int(any(isinstance(t, Refusal) and t.kind in ("wrong", "failed") for t in found))
