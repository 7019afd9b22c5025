"""`grasp-kernels run`: the long one."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_type_hints

from grasp_kernels.cli.options import number_of_directions, seed
from grasp_kernels.pipeline import RunConfig


def add_run(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "run",
        parents=[common],
        help="naive fine-tune, retraining held at the base model elsewhere, and report",
        description="Fine-tune a model on chat data, fine-tune it again so that it answers "
        "everything else as before, and show what both adapters say. Stopped at any point, the "
        "same command goes on from the last checkpoint.",
    )
    hints = get_type_hints(RunConfig)
    for option in fields(RunConfig):
        _add_option(parser, option, hints[option.name])
    parser.set_defaults(
        command=_run, when_stopped="the same command goes on from the last checkpoint."
    )


def _add_option(parser: argparse.ArgumentParser, option: Field[Any], hint: Any) -> None:
    settings: dict[str, Any] = {"help": option.metadata["help"]}
    if option.default is MISSING:
        settings["required"] = True
    elif option.default is not None:
        default = option.default
        shown = (
            " ".join(f"{v:g}" if isinstance(v, float) else v for v in default)
            if (isinstance(default, tuple))
            else default
        )
        settings.update(default=default, help=f"{settings['help']} (default: {shown})")
    if hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif option.metadata["choices"] is not None:
        settings["choices"] = option.metadata["choices"]
    else:
        settings.update(_VALUES[hint])
    if option.name == "seed":
        settings["type"] = seed
    parser.add_argument(f"--{option.name.replace('_', '-')}", **settings)


_VALUES: dict[Any, dict[str, Any]] = {
    str: {"metavar": "NAME"},
    str | None: {"metavar": "FILE"},
    int: {"type": int, "metavar": "N"},
    int | None: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    int | Literal["auto"]: {"type": number_of_directions, "metavar": "N"},
    tuple[float, ...]: {"type": float, "nargs": "+", "metavar": "X"},
    tuple[str, ...]: {"nargs": "+", "metavar": "NAME"},
}


def _run(arguments: argparse.Namespace) -> int:
    quieten()
    config = RunConfig(
        **{option.name: getattr(arguments, option.name) for option in fields(RunConfig)}
    )
    from grasp_kernels.pipeline import is_finished, run
    from grasp_kernels.pipeline.report_text import verdict_sentence

    finished = is_finished(config)
    report = run(config)
    if finished:
        print("This run was finished before; nothing was done.")
    for name, adapter in report.numbers["adapters"].items():
        print(verdict_sentence(name, adapter))
    print(f"Adapters: {report.naive} and {report.retrained}.")
    print(f"Report:   {report.text}")
    return 0


def quieten() -> None:
    """Keep remarks of libraries to their programmers from a user of the command line."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
