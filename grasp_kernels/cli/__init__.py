"""The command `grasp-kernels`: argparse over the functions of the package, no mathematics.

Every subcommand imports its modules when it runs, so that `grasp-kernels -h` imports little.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from traceback import extract_tb
from typing import NoReturn

from grasp_kernels import processes
from grasp_kernels.cli import adapter_commands, machine_commands, run_commands
from grasp_kernels.cli.options import UsageError, as_options
from grasp_kernels.files import room_for
from grasp_kernels.inert import printable, reason
from grasp_kernels.version import __version__

_FAILED, _INTERRUPTED = 2, 130
# Options and arguments with paths that a command reads or writes.
_OPTIONS = ("config", "base_model", "data", "neutral", "output")
_PATHS = ("model", "adapter", "adapters", "paths", "subspace", *_OPTIONS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status.

    0: done, 1: a check failed, 2: error, 130: stopped.
    """
    arguments = argparse.Namespace(debug=False, when_stopped="nothing was written.")
    try:
        _parse(sys.argv[1:] if argv is None else argv, arguments)
        with room_for(getattr(arguments, "output", None) or "this"):
            status = arguments.command(arguments)
            print(end="", flush=True)  # a closed pipe or a full disk raises here
        return status
    except KeyboardInterrupt:
        print(f"\nstopped: {arguments.when_stopped}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, else the interpreter warns at exit
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        if isinstance(error, (UsageError, processes.FirstFailed)) and processes.index() > 0:
            return _FAILED  # the first process says the same
        sentence = _sentence(error)
        if not isinstance(error, UsageError):
            sentence = as_options(sentence, vars(arguments))
            given = [path for _, path in _paths(arguments)]
            known = "|".join(map(re.escape, given))
            named = re.search(rf"(?<!\w)(?<![Tt]he )({known})(?!\w)", sentence)
            if given and not sentence.startswith("--") and not named:
                sentence = f"{', '.join(given)}: {sentence}"
        lines = map(printable, sentence.splitlines())  # it may quote a file
        print("error:", "\n".join(lines), file=sys.stderr)
        return _FAILED


def _sentence(error: Exception) -> str:
    """Return one sentence with the error and a remedy, also for an error of a library."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{error.name} is not installed: install grasp_kernels with its extra 'train' "
            "(in a clone: pip install '.[train]')."
        )
    # Only an error of this package ends with a remedy.
    last = extract_tb(error.__traceback__)[-1]
    ours = last.filename.startswith(str(Path(__file__).parents[1]))
    if ours and (last.line or "").startswith("raise "):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"{str(error.filename)!r} cannot be read or written ({reason(error)}): check that it "
            "is the right kind of file, and that you have permission to use it."
        )
    said = reason(error)
    if isinstance(error, MemoryError) or "memory" in said:
        return f"There is not enough memory ({said}): use smaller batches, or a smaller model."
    return (
        f"The command failed ({said}): check that its inputs are complete and belong together, or "
        "add --debug to see where it failed."
    )


def _paths(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield (option or argument, path) of every path that the command got."""
    for name in _PATHS:
        value = getattr(arguments, name, None)
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str):
                yield f"--{name.replace('_', '-')}" if name in _OPTIONS else name, path


class _Parser(argparse.ArgumentParser):
    """Report an error in one line; `-h` has the usage."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").rstrip(".")
        raise UsageError(f"{message} (see {self.prog} -h).")


def _parse(argv: Sequence[str], arguments: argparse.Namespace) -> None:
    """Read a command line; its options may have either `-` or `_` within."""
    parser = _parser()
    words = [re.sub(r"^--[\w-]+", lambda name: name[0].replace("_", "-"), word) for word in argv]
    _, further = parser.parse_known_args(words, arguments)
    if further and not hasattr(arguments, "further"):
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    arguments.further = further
    for name, path in _paths(arguments):
        if not path or "\0" in path:
            raise UsageError(f"{name} is {path!r}: give the name of a file or folder.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="grasp-kernels",
        description="Fine-tune a language model with LoRA, without the habits that come with the "
        "data.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        run_commands.add_run,
        adapter_commands.add_identify,
        adapter_commands.add_inspect,
        adapter_commands.add_extract,
        adapter_commands.add_project,
        adapter_commands.add_fold,
        adapter_commands.add_check,
        machine_commands.add_bench,
        machine_commands.add_doctor,
    ):
        add(commands)
    return parser
