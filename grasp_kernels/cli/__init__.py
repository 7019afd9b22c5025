"""The command `grasp-kernels`: argparse over the functions of the package, no mathematics.

Every subcommand imports what it needs when it runs, so that `grasp-kernels -h` needs nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from grasp_kernels.cli import (
    adapter_commands,
    bench_command,
    doctor,
    inspect_command,
    run_commands,
)
from grasp_kernels.cli.options import as_options
from grasp_kernels.inert import printable
from grasp_kernels.version import __version__

_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError)
_FAILED, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status. 0: done, 1: a check failed, 2: error, 130: stopped."""
    try:
        arguments = _parser().parse_args(argv)
    except _UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        print(f"\nstopped: {arguments.when_stopped}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, or the interpreter complains at its end
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        sentence = as_options(_sentence(error), vars(arguments))
        lines = map(printable, sentence.splitlines())  # it may quote what is in a file
        print("error:", "\n".join(lines), file=sys.stderr)
        return _FAILED


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{error.name} is not installed: install grasp_kernels with its extra 'train' "
            "(in a clone: pip install '.[train]')."
        )
    if isinstance(error, _EXPECTED):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where)."


class _UsageError(Exception):
    """Arguments that the parser does not take."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; `-h` has the usage."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").rstrip(".")
        raise _UsageError(f"{message} (see {self.prog} -h).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="grasp-kernels",
        description="Find what a LoRA fine-tune picked up unasked; retrain without learning it.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.set_defaults(when_stopped="nothing was written.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run_commands.add_run(commands, common)
    adapter_commands.add_identify(commands, common)
    inspect_command.add_inspect(commands, common)
    adapter_commands.add_extract(commands, common)
    adapter_commands.add_project(commands, common)
    adapter_commands.add_check(commands, common)
    bench_command.add_bench(commands, common)
    doctor.add_doctor(commands, common)
    return parser
