"""Files appear whole or not at all, and never over somebody else's."""

import errno
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from grasp_kernels.inert import reason

_PARTIAL = ".partial"
# The words of safetensors and torch, and of `room_for` itself for a file inside of a folder.
_NO_ROOM = (
    *("No space left", "Disk quota exceeded", "File too large"),
    *("PytorchStreamWriter failed", "no room left on the disk"),
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = 64  # characters of the name, so that a long name with additions stays within 255


@contextmanager
def whole_file(path: str | PathLike[str]) -> Iterator[Path]:
    """Give a temporary path; after a successful block its file or folder replaces `path`.

    It is in a new folder next to `path` with an unguessable name. So no link lies there, and the
    remains of a killed process are in nobody's way.

    Raises:
        OSError: there is no room, or nothing can be written there.
    """
    target = Path(path)
    with _naming(target):
        folder = TemporaryDirectory(
            dir=target.parent,
            prefix=f".{target.name[:_NAME]}.",
            suffix=_PARTIAL,
            ignore_cleanup_errors=True,
        )
    with folder as name, room_for(target):
        temporary = Path(name) / target.name
        yield temporary
        _settle(temporary)
        with _naming(target):
            os.replace(temporary, target)


@contextmanager
def whole_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """Give an empty folder; after a successful block it replaces `path`, as in `whole_file`.

    Raises:
        OSError: there is no room, or nothing can be written there.
    """
    target = Path(path)
    with _naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as temporary:
        temporary.mkdir()
        yield temporary


def left_behind(path: str | PathLike[str]) -> list[Path]:
    """Return the folders left by killed processes in writing `path`."""
    target = Path(path)
    made = re.compile(rf"\.{re.escape(target.name[:_NAME])}\.[a-z0-9_]{{8}}{re.escape(_PARTIAL)}")
    found = [path for path in target.parent.glob(".*") if made.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _settle(path: Path) -> None:
    """Bring files to the disk, with the rights of any new file; safetensors' are the owner's."""
    new = path.parent / f"{path.name[:_NAME]}.rights"
    new.touch()
    for file in [path, *path.rglob("*")]:
        if not file.is_file() or file.is_symlink():
            continue
        file.chmod(new.stat().st_mode)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


@contextmanager
def room_for(target: str | PathLike[str]) -> Iterator[None]:
    """Name the target if the disk is full; libraries name temporary files, or nothing.

    Raises:
        OSError: there is no room.
    """
    try:
        yield
    except Exception as error:
        said = any(text in str(error) for text in _NO_ROOM)
        if getattr(error, "errno", None) not in _FULL and not said:
            raise
        raise OSError(
            f"There is no room left on the disk for {str(target)!r}: free some space, and repeat."
        ) from error


@contextmanager
def about(*names: str) -> Iterator[None]:
    """Put names in front of an error of the block unless it has one of them."""
    try:
        yield
    except ValueError as error:
        if any(name in str(error) for name in names):
            raise
        raise ValueError(f"{' and '.join(names)}: {error}") from error


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Name the requested file in errors on a temporary file."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"{str(target)!r} cannot be written ({reason(error)}): choose another path."
        ) from error


def new_file(path: str | PathLike[str]) -> Path:
    """Return the path of a new file, yet to be written.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: something is there, no such folder, no name.
    """
    target = _new(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(target.parent)!r} does not exist; make it first.")
    _check_writable(target.parent)
    return target


def new_folder(path: str | PathLike[str]) -> Path:
    """Return the path of a new folder, yet to be made.

    Raises:
        FileExistsError, NotADirectoryError, ValueError: something is there, or no folder above.
    """
    target = _new(path)
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{str(above)!r} is a file: choose another folder.")
    _check_writable(above)
    return target


def _new(path: str | PathLike[str]) -> Path:
    if not os.fspath(path):
        raise ValueError("The path is empty: give a name.")
    target = Path(path)
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return target
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} is no valid path ({reason(error)}): choose another.") from None
    raise FileExistsError(f"{target} already exists: choose another path, or remove it.")


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"The folder {str(folder)!r} is not writable: choose another one.")


def check_own_folder(path: str | PathLike[str], note: str, *, beside: Collection[str] = ()) -> None:
    """Raise unless a command may work in a folder: new, empty, or with the command's note.

    Args:
        note: name of the file that marks the folders of a command.
        beside: names that may be there before the note.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: it is somebody else's.
    """
    folder = Path(path)
    above = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not above.is_dir():
        raise NotADirectoryError(
            f"The output folder {folder} cannot be made ({above} is no folder): choose another."
        )
    _check_writable(above)
    if above == folder and not (folder / note).exists():
        ours = {*(folder / name for name in beside), *left_behind(folder / note)}
        if foreign := sorted({*folder.iterdir()} - ours):
            raise ValueError(
                f"The output folder {folder} contains {foreign[0].name} but no {note}, so this "
                "command did not make it: choose an empty or a new folder."
            )


def inside(file: Path) -> Path:
    """Return the file unless it lies outside of its folder, or of the blobs of the hub's cache.

    Raises:
        ValueError: it is a link that leads out of the folder.
    """
    folder, target = file.parent.resolve(), file.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(target.is_relative_to(one) for one in allowed):
        raise ValueError(
            f"{str(file)!r} is a link to {str(target)!r}, outside of its folder; to use that file, "
            "put the file itself there."
        )
    return file


def read_json(path: str | PathLike[str], what: str, remedy: str, *, kind: type = dict) -> Any:
    """Read a JSON object from a file.

    Args:
        what: kind of the expected file, such as "index of shards".
        remedy: advice on another file, such as "save the adapter again".
        kind: list for an array.

    Raises:
        ValueError: no JSON, or no object.
    """
    content = Path(path).read_bytes()
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        wrong = reason(error)
    else:
        if isinstance(found, kind):
            return found
        wrong = f"it holds a {type(found).__name__}"
    raise ValueError(f"{str(path)!r} is not a valid {what} ({wrong}): {remedy}.")


@contextmanager
def open_tensors(path: str | PathLike[str], remedy: str) -> Iterator[Any]:
    """Open a safetensors file for a block.

    Raises:
        OSError: the file is not there, or cannot be read.
        ValueError: the file is not a safetensors file, or not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb"):
            pass  # whose errors have words
        with safe_open(str(path), framework="pt") as file:
            yield file
    except OSError as error:
        raise type(error)(f"{str(path)!r} cannot be read ({reason(error)}): {remedy}.") from None
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is not a complete safetensors file ({reason(error)}): {remedy}."
        ) from None


def read(file: Any, name: str) -> Any:
    """Copy a tensor from a file of `open_tensors` into new memory.

    The alignment in the file depends on the length of the header, and products of equal numbers at
    another alignment are rounded differently (findings/safetensors_note_changes_products.sh).
    """
    return file.get_tensor(name).clone()


def read_all(file: Any) -> dict[str, Any]:
    """Read all tensors of a file of `open_tensors`, as `read` does."""
    return {name: read(file, name) for name in file.keys()}  # noqa: SIM118


def write_json(path: Path, value: Any) -> None:
    """Write `value` whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
