"""Files appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; a block that succeeds puts the file in its place.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(target.parent)!r} does not exist; make it first.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """Give an empty folder beside `path`; a block that succeeds puts it in its place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def stored_tensors(
    path: str | PathLike[str], what: str, writer: str
) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Tensors by name and the text beside them, of a safetensors file; for a block that makes
    something of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or the block cannot make `what` of it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            yield {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} holds no {what} ({error}): give a file that {writer} wrote."
        ) from None
