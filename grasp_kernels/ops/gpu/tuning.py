"""Launch choices that were tuned on this GPU, in force once they are loaded; without them, tables.

A key names everything that a choice depends on and never `T`, so no length compiles anew. Nothing
is read unless somebody calls `load_tuning`, and looking a key up is one access of a dictionary. A
file holds for the GPU, the Triton and the release of this package that it was made with.
Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from grasp_kernels.files import whole_file
from grasp_kernels.version import __version__


class DownKey(NamedTuple):
    """A down pass over `[T, K]` for `R` rows."""

    gpu: str
    itemsize: int
    K: int
    R: int
    tma: bool
    dropout: bool
    kernel: str = "down"


class TokensKey(NamedTuple):
    """A token pass over `[T, C]` with a basis of `Q` columns, of which `E` skinny rows come."""

    gpu: str
    itemsize: int
    C: int
    R: int
    Q: int
    E: int
    tma: bool
    dropout: bool
    kernel: str = "tokens"


class GemmKey(NamedTuple):
    """An extended product `[T, I] [I, J]`, or with `accumulate` what is added to one."""

    gpu: str
    itemsize: int
    I: int
    J: int
    R: int
    Q: int
    transposed: bool
    tma: bool
    dropout: bool
    accumulate: bool
    kernel: str = "gemm"


Key = DownKey | TokensKey | GemmKey
Fields = dict[str, int]  # of a DownTile, Slab or Tile, by name
Made = TypeVar("Made")

_KEYS: dict[str, type[Key]] = {"down": DownKey, "tokens": TokensKey, "gemm": GemmKey}
_SCHEDULE = ("num_warps", "num_stages")
_FIELDS = {
    "down": {"t", "k", "r", *_SCHEDULE},
    "tokens": {"t", "c", "r", *_SCHEDULE, "wide"},
    "gemm": {"t", "j", "i", *_SCHEDULE},
}
# Blocks are within what a matrix instruction and a bulk copy take.
_SMALLEST = dict.fromkeys(_SCHEDULE, 1)
_LARGEST = {"num_warps": 16, "num_stages": 8}
_AGAIN = "make a new file on this machine with `grasp-kernels tune`"

_in_force: dict[Key, Fields] = {}
_listeners: list[list[Key]] = []


def tuned(key: Key, make: type[Made]) -> Made | None:
    """The choice in force for a key, or None."""
    for asked in _listeners:
        asked.append(key)
    fields = _in_force.get(key)
    return None if fields is None else make(**fields)


@contextmanager
def consulted() -> Iterator[list[Key]]:
    """The keys that launches ask for inside the block, in order."""
    asked: list[Key] = []
    _listeners.append(asked)
    try:
        yield asked
    finally:
        _listeners.remove(asked)


def load_tuning(path: str | PathLike[str]) -> int:
    """Put the choices of a file that `grasp-kernels tune` wrote in force; how many there are.

    They hold for this process, from the next launch on, and replace what is in force for the same
    launches. A file that cannot be used changes nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was made elsewhere, or is not such a file; the sentence says which.
    """
    found = read_tuning(path)
    _in_force.update(found)
    return len(found)


def save_tuning(path: str | PathLike[str], gpu: str, choices: Mapping[Key, Fields]) -> None:
    """Write choices made on `gpu`, whole or not at all."""
    rows = [{**_named(key), "choice": fields} for key, fields in choices.items()]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    header = json.dumps({"gpu": gpu, **_versions()})[1:-1]
    with whole_file(path) as partial:
        partial.write_text(f'{{{header}, "choices": [\n{lines}\n]}}\n', encoding="utf-8")


def read_tuning(path: str | PathLike[str]) -> dict[Key, Fields]:
    """The choices of a file, if it was made for what is here; raises as `load_tuning` does."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r} with tuned launches; {_AGAIN}.")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        origin = {name: str(stored[name]) for name in ("gpu", *_versions())}
        rows = list(stored["choices"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(file)!r} is not a file of tuned launches ({error!r}); {_AGAIN}."
        ) from None
    _check_origin(file, origin)
    found: dict[Key, Fields] = {}
    for number, row in enumerate(rows, 1):
        try:
            key, fields = _parsed(row, origin["gpu"])
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"choice {number} of {str(file)!r} is not one of a launch ({error}); {_AGAIN}."
            ) from None
        found[key] = fields
    return found


def _named(key: Key) -> dict[str, Any]:
    """A key as it stands in a file, whose head names the GPU."""
    named = key._asdict()
    del named["gpu"]
    return {"kernel": named.pop("kernel"), **named}


def _parsed(row: dict[str, Any], gpu: str) -> tuple[Key, Fields]:
    sizes = dict(row)
    kernel, fields = sizes.pop("kernel", None), dict(sizes.pop("choice", {}))
    if kernel not in _KEYS:
        raise ValueError(f"kernel {kernel!r} is unknown")
    make = _KEYS[kernel]
    expected = set(make._fields) - {"gpu", "kernel"}
    if sizes.keys() != expected or fields.keys() != _FIELDS[kernel]:
        raise ValueError(
            f"it names {sorted({*sizes, *fields})}, not {sorted(expected | _FIELDS[kernel])}"
        )
    wrong = [name for name, value in fields.items() if not _possible(name, value)]
    wrong += [name for name, value in sizes.items() if type(value) not in (int, bool)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {(sizes | fields)[wrong[0]]!r}")
    return make(gpu=gpu, **sizes), fields


def _possible(name: str, value: Any) -> bool:
    """Whether a field can have a value: blocks and warps are powers of two."""
    if name == "wide":
        return type(value) is bool
    if type(value) is not int or not _SMALLEST.get(name, 16) <= value <= _LARGEST.get(name, 256):
        return False
    return name == "num_stages" or value & (value - 1) == 0


def _check_origin(file: Path, origin: dict[str, str]) -> None:
    here = _gpus_here()
    if origin["gpu"] not in here:
        raise ValueError(
            f"{str(file)!r} was tuned on {origin['gpu']!r} but this machine has "
            f"{' and '.join(map(repr, sorted(here)))}; {_AGAIN}."
        )
    for name, version in _versions().items():
        if origin[name] != version:
            raise ValueError(
                f"{str(file)!r} was tuned with {name} {origin[name]} but {version} is installed; "
                f"{_AGAIN}."
            )


def _versions() -> dict[str, str]:
    """What compiles the kernels, and what they are."""
    from triton import __version__ as triton

    return {"triton": triton, "grasp_kernels": __version__}


def _gpus_here() -> set[str]:
    """Names as in the launch tables; on a CPU there is Triton's interpreter."""
    from grasp_kernels.ops.gpu.launch import part_of

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", i) for i in range(n_gpus)] or [torch.device("cpu")]
    return {part_of(device).name for device in devices}
