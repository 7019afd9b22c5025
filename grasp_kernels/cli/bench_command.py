"""`grasp-kernels bench`: time the layers of known models on this machine."""

from __future__ import annotations

import argparse
from typing import Any


def add_bench(commands: Any, common: argparse.ArgumentParser) -> None:
    bench = commands.add_parser(
        "bench",
        parents=[common],
        help="time stock peft and GraspLoRALinear side by side",
        description="Check every provider against float64, then time forward and backward of the "
        "linear layers of a model, all providers in turn. Prints a table; --output keeps the rows.",
    )
    bench.add_argument("--models", nargs="+", metavar="NAME", help="default: qwen2.5-0.5b")
    bench.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="default: float32 bfloat16")
    bench.add_argument("--tokens", nargs="+", type=int, metavar="T", help="default: 512")
    bench.add_argument("--providers", nargs="+", metavar="NAME", help="default: all")
    bench.add_argument("--rank", type=int, metavar="R", help="LoRA rank, default 16")
    bench.add_argument("--basis", type=int, metavar="Q", help="size of the basis, default 4")
    bench.add_argument("--rounds", type=int, help="measurements of each, default 15")
    bench.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    bench.add_argument("--output", metavar="FILE.jsonl", help="where to keep the rows")
    bench.add_argument("--report", metavar="FILE.jsonl", help="only print the table of kept rows")
    bench.set_defaults(
        command=_bench, when_stopped="the benchmark keeps rows only when it is done."
    )


def _bench(arguments: argparse.Namespace) -> int:
    from grasp_kernels.bench import Suite, read_rows, run_suite, table, write_rows

    if arguments.report:
        print(table(read_rows(arguments.report)))
        return 0
    chosen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in Suite.__dataclass_fields__ and value is not None
    }
    rows = list(_with_progress(run_suite(Suite(**chosen))))
    if arguments.output:
        write_rows(arguments.output, rows)
    print(table(rows))
    return 0 if all(row["refused"] is None for row in rows) else 1


def _with_progress(rows: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(rows, desc="benchmark", unit="row")
