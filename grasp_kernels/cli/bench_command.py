"""`grasp-kernels bench`: time the layers of known models on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grasp_kernels.cli.options import file_to_write
from grasp_kernels.files import new_file


def add_bench(commands: Any, common: argparse.ArgumentParser) -> None:
    bench = commands.add_parser(
        "bench",
        parents=[common],
        help="time stock peft and GraspLoRALinear side by side",
        description="Check every provider against float64, then time forward and backward of the "
        "linear layers of a model, of a decoder layer or of a training step, all providers in "
        "turn. Prints tables; --output keeps the rows.",
    )
    cases = bench.add_argument_group("what to measure")
    cases.add_argument("--preset", metavar="NAME", help="quick, llama or full; options win over it")
    cases.add_argument("--level", metavar="LEVEL", help="linear (default), layer or step")
    cases.add_argument("--models", nargs="+", metavar="NAME", help="default: qwen2.5-0.5b")
    cases.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="default: float32 bfloat16")
    cases.add_argument("--tokens", nargs="+", type=int, metavar="T", help="default: 512")
    cases.add_argument(
        *("--rank", "--ranks"),
        **{"dest": "ranks", "nargs": "+", "type": int, "metavar": "R"},
        help="LoRA ranks, default 16",
    )
    cases.add_argument(
        "--basis", nargs="+", type=int, metavar="Q", help="sizes of the basis, default 4; 0: none"
    )
    cases.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help="names, all, peers; default: the usual ones, see --list",
    )
    cases.add_argument(
        "--layers", type=int, metavar="L", help="layers of a step, default: the model's"
    )
    how = bench.add_argument_group("how")
    how.add_argument("--rounds", type=int, help="measurements of each, default 15")
    how.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    caches = how.add_mutually_exclusive_group()
    for name, cold, default in (("--cold", True, " (default)"), ("--warm", False, "")):
        caches.add_argument(
            name,
            dest="cold",
            action="store_const",
            const=cold,
            help=f"GPU: the L2 holds nothing of the last call{default}"
            if cold
            else "GPU: the L2 holds what the last call left",
        )
    rows = bench.add_argument_group("rows")
    rows.add_argument("--output", metavar="FILE", help="keep the rows: .csv, or JSON lines")
    rows.add_argument("--report", nargs="+", metavar="FILE", help="only show kept rows")
    rows.add_argument("--details", action="store_true", help="all measures of every case")
    rows.add_argument(
        "--plot", type=file_to_write, metavar="FILE.png", help="draw the ratio to the floor"
    )
    rows.add_argument(
        "--adopt",
        nargs="+",
        metavar="FILE",
        help='let backend "auto" choose by these rows, which were measured on this GPU',
    )
    rows.add_argument("--list", action="store_true", help="list models, presets and providers")
    bench.set_defaults(
        command=_bench, when_stopped="the rows so far are in the file of --output, if given."
    )


def _bench(arguments: argparse.Namespace) -> int:
    from grasp_kernels.bench import Suite, plot, read_rows, run_suite, table

    if arguments.list:
        print(_listing())
        return 0
    if arguments.adopt:
        from grasp_kernels.bench.adopt import adopt

        print(f"{adopt(read_rows(*arguments.adopt))} shapes measured for backend 'auto'")
        return 0
    if arguments.report:
        rows = read_rows(*arguments.report)
    else:
        if arguments.output and Path(arguments.output).exists():
            read_rows(arguments.output)  # rows alone are replaced
        elif arguments.output is not None:
            new_file(arguments.output)
        suite = Suite(**_chosen(arguments, Suite.__dataclass_fields__))
        rows = []
        with _kept(arguments.output, rows):
            for row in _with_progress(run_suite(suite)):
                rows.append(row)  # one by one: rows of a run that is stopped are kept
    print(table(rows, arguments.details))
    if arguments.plot:
        plot(rows, arguments.plot)
    broken = any(row["refusal"] in ("wrong", "failed") for row in rows)
    return 1 if broken and not arguments.report else 0


def _chosen(arguments: argparse.Namespace, fields: Iterable[str]) -> dict[str, Any]:
    from grasp_kernels.bench import PRESETS

    name = arguments.preset
    if name is not None and name not in PRESETS:
        raise ValueError(f"preset is {name!r}, which is unknown; use one of {sorted(PRESETS)}.")
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in fields and value is not None
    }
    return {**PRESETS.get(name, {}), **given}


@contextmanager
def _kept(output: str | None, rows: list[dict[str, Any]]) -> Iterator[None]:
    """Write what was measured, however the block ends."""
    from grasp_kernels.bench import write_rows

    try:
        yield
    finally:
        if output and rows:
            write_rows(output, rows)


def _with_progress(rows: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(rows, desc="benchmark", unit="row")


def _listing() -> str:
    from grasp_kernels.bench import PRESETS
    from grasp_kernels.bench.providers import PROVIDERS
    from grasp_kernels.bench.shapes import MODELS

    width = max(map(len, PROVIDERS))
    return "\n".join(
        [
            f"models:  {' '.join(MODELS)}",
            f"presets: {' '.join(PRESETS)}",
            "providers (* timed when none is named, + for layers and steps too):",
            *(
                f"  {'*' if provider.by_default else ' '}{'+' if provider.adapt else ' '} "
                f"{name:<{width}}  {provider.what}"
                for name, provider in PROVIDERS.items()
            ),
        ]
    )
