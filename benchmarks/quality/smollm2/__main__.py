"""`python -m benchmarks.quality.smollm2`: measure what is missing, or show what there is.

measure   train and judge, a row for each point of a curve
verdicts  what the product says of the adapters that are there
report    the tables and the figure of the rows
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.quality.smollm2.base import make_base
from benchmarks.quality.smollm2.bench import Plan
from benchmarks.quality.smollm2.harness import Work, measure
from benchmarks.quality.smollm2.methods import METHODS
from benchmarks.quality.smollm2.report import write_report
from benchmarks.quality.smollm2.tasks import TASKS
from benchmarks.quality.smollm2.verdicts import judge_verdicts
from grasp_kernels.pipeline.config import DTYPES, RunConfig

_RESULTS = Path(__file__).parents[1] / "results" / "smollm2"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do what it says."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "report":
            write_report(options.output)
            return
        work = _work(options) if options.command == "measure" else None
        base = options.base or make_base(options.output / "base")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    if work is None:
        judge_verdicts(options.output, base, dtype=options.dtype)
    else:
        measure(work, options.output, base=base)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.smollm2",
        description="Drift against task on a real chat model, SmolLM2-135M-Instruct.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="tables and figure of the rows of a folder")
    run = commands.add_parser("measure", help="train and judge what a folder has no rows of")
    verdicts = commands.add_parser("verdicts", help="what the product says of a folder's adapters")
    here = Path("real-output")
    for command, output in ((report, _RESULTS), (run, here), (verdicts, here)):
        command.add_argument(
            "--output", type=Path, default=output, help="folder of the rows (default: %(default)s)"
        )
    for command in (run, verdicts):
        command.add_argument(
            "--dtype", default="float32", choices=DTYPES, help="of the frozen model"
        )
        command.add_argument("--base", type=Path, help="checkpoint folder; default: made in output")
        command.add_argument("--threads", type=int, help="of torch")
    run.add_argument(
        "--tasks",
        nargs="+",
        default=["tone/factor", "slant/factor", "slant/mirror"],
        metavar="TASK/ARM",
        help=f"of {', '.join(f'{n}/{a}' for n, task in TASKS.items() for a in task.ARMS)}",
    )
    run.add_argument("--methods", nargs="+", default=["naive", "scaled", "run"], choices=METHODS)
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--steps", type=int, default=192, help="budget of a training")
    run.add_argument("--every", type=int, default=48, help="steps between points of a curve")
    run.add_argument(
        "--num-documents", type=int, default=RunConfig.num_documents, help="chats of the base model"
    )
    run.add_argument(
        "--max-new-tokens", type=int, default=RunConfig.max_new_tokens, help="tokens of their turns"
    )
    return parser


def _work(options: argparse.Namespace) -> Work:
    settings = {"num_documents": options.num_documents, "max_new_tokens": options.max_new_tokens}
    return Work(
        tasks=tuple((name, arm) for name, _, arm in (t.partition("/") for t in options.tasks)),
        methods=tuple(options.methods),
        seeds=tuple(options.seeds),
        dtype=options.dtype,
        plan=Plan(options.steps, options.every, tuple(settings.items())),
    )


if __name__ == "__main__":
    main()
