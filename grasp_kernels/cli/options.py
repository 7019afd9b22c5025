"""The values of options of several commands, and the names of options in messages."""

import argparse
import re
import shlex
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from grasp_kernels.files import new_file, new_folder


class UsageError(ValueError):
    """Report arguments that a command does not take."""


def add_command(
    commands: Any, name: str, run: Callable[..., int], summary: str, **more: Any
) -> argparse.ArgumentParser:
    """Add a subcommand; the docstring of its function is the description."""
    parser: argparse.ArgumentParser
    parser = commands.add_parser(name, help=summary, description=run.__doc__, **more)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=run)
    return parser


def number_of_directions(text: str) -> int | Literal["auto"]:
    """Return the value of `--k`."""
    if text != "auto" and not re.fullmatch(r"[+-]?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: give one, or 'auto'.")
    return "auto" if text == "auto" else int(text)


def file_to_write(text: str) -> str:
    """Return the name of a file that does not exist yet: a command overwrites no file."""
    return str(_checked(new_file, text))


def folder_to_write(text: str) -> str:
    """Return the name of a folder that does not exist yet."""
    return str(_checked(new_folder, text))


def _checked(check: Callable[[str], Path], text: str) -> Path:
    try:
        return check(text)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def as_options(message: str, names: Iterable[str]) -> str:
    """Write a message with options as on the command line, without its remedy for Python.

    `max_length`, `orthogonal = False` and `k is 5` become `--max-length`, `--no-orthogonal` and
    `--k is 5`.

    Args:
        names: names of the options of the command in Python.
    """
    message = re.sub(r"; in Python, .*", ".", message, flags=re.DOTALL)
    for name in sorted(names, key=len, reverse=True):
        option = f"--{name.replace('_', '-')}"
        message = re.sub(rf"{_ALONE}{name} ?= ?({_VALUE})", partial(_given, option), message)
        message = re.sub(rf"^{name}(?= is )|(?<=option ){name}\b", option, message)
        if "_" in name:  # not an English word
            message = re.sub(rf"{_ALONE}{name}(?![\w/\\'\"=]|\.\w)", option, message)
    return message


_ALONE = r"(?<![\w./\\'\"-])"  # neither in a longer name nor in a path
_QUOTES = "'\""
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^]]*\]|[-+]?\d[\w.+-]*\w|\d|True|False|None"


def _given(option: str, value: re.Match[str]) -> str:
    """Return an option and its value as on the command line."""
    text = value[1]
    if text in ("True", "False"):
        return option if text == "True" else option.replace("--", "--no-", 1)
    if text == "None":
        return f"no {option}"
    if text[0] == "[":
        return f"{option} {re.sub(r'[],[]', '', text)}".replace("'", "")
    return f"{option} {shlex.quote(text[1:-1]) if text[0] in _QUOTES else text}"
