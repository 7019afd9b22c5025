"""Text of others, such as names in a file or training records, made inert before it is shown.

A tensor may be called anything. Shown as it is, its name could start a heading, load an image from
elsewhere, or move the cursor of a terminal.
"""

import json
import re
from collections.abc import Iterable

# Signs that open a cell, code, emphasis, HTML or a fence, and their lookalike.
_LOOK_ALIKES = str.maketrans({"|": "¦", "`": "'", "*": "∗", "<": "‹", ">": "›", "~": "∼"})
_LONGEST = 300
_OF_THE_HUB = {  # of the Hugging Face hub, whose errors are long
    "HFValidationError": "the name is not valid there",
    "RepositoryNotFoundError": "it does not exist or is private",
    "GatedRepoError": "its terms must be accepted there first",
    "LocalEntryNotFoundError": "the hub cannot be reached, and there is no local copy",
    "ConnectionError": "the hub cannot be reached",
}


def printable(text: str) -> str:
    """Return one line for a terminal, with unprintable characters spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def inert(text: str) -> str:
    """Return one line of text without any effect in Markdown or a terminal."""
    line = printable(" ".join(str(text).split())).translate(_LOOK_ALIKES)
    line = re.sub(r"\](?=[(:\[])", "] ", line)  # neither a link nor an image, nor a target
    return re.sub(r"^(#+|[-+=]+)(?= |$)", lambda found: f"\\{found[0]}", line)


def shown(value: object) -> str:
    """Return a value of a file for an error message: one line of limited length."""
    text = printable(repr(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def reason(error: BaseException) -> str:
    """Return one line on a library's exception for somebody unfamiliar with its code."""
    if type(error).__name__ in _OF_THE_HUB:
        return _OF_THE_HUB[type(error).__name__]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON, {error}"
    if isinstance(error, KeyError):
        return f"it has no {shown(error.args[0] if error.args else None)}"
    if isinstance(error, (AttributeError, LookupError, TypeError, NotImplementedError)):
        return "a value in it is missing or has the wrong type"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable((lines or [type(error).__name__])[0].rstrip(" :."))[:_LONGEST]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 step` or `2 steps`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Iterable[str], most: int = 4) -> str:
    """Return the first names, inert, and the number of the others."""
    known = sorted(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(inert(name[:_LONGEST]) for name in known[:most]) + more
