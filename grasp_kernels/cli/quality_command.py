"""`grasp-kernels bench quality`: drift against task, for every method on every dish."""

from __future__ import annotations

import argparse
from typing import Any

from grasp_kernels.cli.options import seed


def add_quality(kinds: Any, common: argparse.ArgumentParser) -> None:
    quality = kinds.add_parser(
        "quality",
        parents=[common],
        help="drift against task on small models with a planted factor, for GRASP and its peers",
        description="Pretrain small models on worlds with a planted factor, fine-tune them with "
        "every method on the same data and budget, and score what they learned and how far they "
        "drift. Strengths are tuned on other seeds than those reported. Stopped at any point, the "
        "same command goes on.",
    )
    quality.add_argument("--output", metavar="FOLDER", help="folder of rows, dishes and report")
    quality.add_argument("--dishes", nargs="+", metavar="NAME", help="default: all, see --list")
    quality.add_argument(
        "--methods", nargs="+", metavar="NAME", default=["all"], help="default: all, see --list"
    )
    quality.add_argument(
        "--seeds",
        nargs="+",
        type=seed,
        metavar="N",
        default=[0, 1, 2, 3, 4],
        help="worlds that are reported (default: 0 1 2 3 4)",
    )
    quality.add_argument("--size", default="small", metavar="SIZE", help="default: small")
    quality.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    quality.add_argument(
        "--keep-strengths",
        action="store_true",
        help="do not tune: take the strengths of strengths.json in the folder",
    )
    quality.add_argument("--report", metavar="FOLDER", help="only write the report of a folder")
    quality.add_argument("--list", action="store_true", help="list dishes, sizes and methods")
    quality.set_defaults(command=_quality, when_stopped="the same command goes on.")


def _quality(arguments: argparse.Namespace) -> int:
    from grasp_kernels.cli.run_commands import quieten

    quieten()
    if arguments.list:
        print(_listing())
        return 0
    from grasp_kernels.quality.report import write_report

    if arguments.report:
        print(write_report(arguments.report))
        return 0
    if not arguments.output:
        raise ValueError("there is nowhere to put the rows: give --output FOLDER.")
    from grasp_kernels.quality.dishes import DISHES
    from grasp_kernels.quality.harness import Plan, run_plan

    plan = Plan(
        dishes=tuple(arguments.dishes or DISHES),
        methods=tuple(arguments.methods),
        seeds=tuple(arguments.seeds),
        size=arguments.size,
        tune=not arguments.keep_strengths,
        device=arguments.device,
    )
    rows = run_plan(plan, arguments.output, progress=True)
    print(write_report(arguments.output))
    return 1 if any(row["failure"] for row in rows) else 0


def _listing() -> str:
    from grasp_kernels.quality.dishes import DISHES, SIZES
    from grasp_kernels.quality.methods import METHODS

    width = max(map(len, (*DISHES, *METHODS)))
    return "\n".join(
        [
            f"sizes: {' '.join(SIZES)}",
            "dishes:",
            *(f"  {name:<{width}}  {dish.what}" for name, dish in DISHES.items()),
            "methods (what each sees, its strengths, its source):",
            *(
                f"  {m.name:<{width}}  {m.what} [{m.information}; "
                f"{' '.join(map(str, m.strengths)) if m.strengths != (None,) else 'no strength'}; "
                f"{m.source}]"
                for m in METHODS.values()
            ),
        ]
    )
