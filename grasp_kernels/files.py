"""Files appear whole or not at all."""

from __future__ import annotations

import json
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


def inside(file: Path) -> Path:
    """The file, if it lies in its folder; one of the hub's cache may lie among its blobs.

    Raises:
        ValueError: it is a link that leads out of the folder.
    """
    folder, target = file.parent.resolve(), file.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(target.is_relative_to(one) for one in allowed):
        raise ValueError(
            f"{str(file)!r} is a link that leads out of its folder, to {str(target)!r}; if it is "
            "meant, put the file itself there."
        )
    return file


def read_json(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        what: what the file should be, such as "index of shards".
        remedy: what to do where it is not, such as "save the adapter again".

    Raises:
        ValueError: no JSON, or no object.
    """
    content = inside(path).read_bytes()
    try:
        found = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        reason = "it is not text in UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = f"it is not JSON ({error})"
    else:
        if isinstance(found, dict):
            return found
        reason = f"it holds a {type(found).__name__}"
    raise ValueError(f"{str(path)!r} is no {what}: {reason}; {remedy}.")


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
