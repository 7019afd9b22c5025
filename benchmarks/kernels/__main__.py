"""`python -m benchmarks.kernels`: time the layers of known models on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.kernels import Suite, read_rows, run_suite, table, write_rows
from benchmarks.kernels.providers import PROVIDERS
from benchmarks.kernels.shapes import MODELS
from grasp_kernels.progress import bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, measure or report; the exit status is 1 for a wrong provider."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _bench(options)
    except KeyboardInterrupt:
        print("\nstopped: the rows so far are in the file of --output, if given.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    bench = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Check every provider against float64, then time forward and backward of the "
        "linear layers of a model, of a decoder layer or of a training step, all providers in "
        "turn. Prints tables; --output keeps the rows.",
    )
    cases = bench.add_argument_group("what to measure")
    cases.add_argument("--level", metavar="LEVEL", help="linear (default), layer or step")
    cases.add_argument("--models", nargs="+", metavar="NAME", help="default: qwen2.5-0.5b")
    cases.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="default: float32 bfloat16")
    cases.add_argument("--tokens", nargs="+", type=int, metavar="T", help="default: 512")
    cases.add_argument(
        "--rank", dest="ranks", nargs="+", type=int, metavar="R", help="LoRA ranks, default 16"
    )
    cases.add_argument(
        "--basis", nargs="+", type=int, metavar="Q", help="sizes of the basis, default 4; 0: none"
    )
    cases.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help="names, or all; default: the usual ones, see --list",
    )
    cases.add_argument(
        "--layers", type=int, metavar="L", help="layers of a step, default: the model's"
    )
    how = bench.add_argument_group("how")
    how.add_argument("--rounds", type=int, help="measurements of each, default 15")
    how.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    rows = bench.add_argument_group("rows")
    rows.add_argument("--output", metavar="FILE", help="keep the rows, as JSON lines")
    rows.add_argument("--report", nargs="+", metavar="FILE", help="only show kept rows")
    rows.add_argument("--details", action="store_true", help="all measures of every case")
    rows.add_argument("--list", action="store_true", help="list models and providers")
    return bench


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print(_listing())
        return 0
    if arguments.report:
        rows = read_rows(*arguments.report)
    else:
        if arguments.output and Path(arguments.output).exists():
            read_rows(arguments.output)  # rows alone are replaced
        suite = Suite(**_chosen(arguments))
        rows = []
        with _kept(arguments.output, rows):
            for row in _with_progress(run_suite(suite)):
                rows.append(row)  # one by one: rows of a run that is stopped are kept
    print(table(rows, arguments.details))
    broken = any(row["refusal"] in ("wrong", "failed") for row in rows)
    return 1 if broken and not arguments.report else 0


def _chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in Suite.__dataclass_fields__ and value is not None
    }


@contextmanager
def _kept(output: str | None, rows: list[dict[str, Any]]) -> Iterator[None]:
    """Write what was measured, however the block ends."""
    try:
        yield
    finally:
        if output and rows:
            write_rows(output, rows)


def _with_progress(rows: Any) -> Any:
    return bar(rows, desc="benchmark", unit="row")


def _listing() -> str:
    width = max(map(len, PROVIDERS))
    return "\n".join(
        [
            f"models:  {' '.join(MODELS)}",
            "providers (* timed when none is named, + for layers and steps too):",
            *(
                f"  {'*' if provider.by_default else ' '}{'+' if provider.adapt else ' '} "
                f"{name:<{width}}  {provider.what}"
                for name, provider in PROVIDERS.items()
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
