"""The folder of a run: what lies where, which stages are finished, and who is using it.

A stage is finished if and only if its final artefact exists, and an artefact appears whole: it is
written beside its place and renamed. So a run can be stopped anywhere, also by SIGKILL.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from grasp_kernels.files import whole_file, whole_folder
from grasp_kernels.run.config import RunConfig
from grasp_kernels.version import __version__

__all__ = ["RunFolder", "fingerprint", "whole_folder", "write_json", "write_lines", "write_text"]

# Files up to this size are hashed whole. Of larger ones (weights) only both ends are: hashing the
# 16 GB of an 8B model takes a minute, and the header with all shapes lies at the beginning.
_HASHED_WHOLE = 64 * 2**20
_END = 2**20
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_INPUTS = ("model", "data", "neutral")  # compared by content, so that they may be moved


class RunFolder:
    """Paths of a run below `root`, which is created if it is missing.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"The output folder {root} cannot be made ({error.strerror}): choose another one."
            ) from None
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise PermissionError(f"The output folder {root} is not writable: choose another one.")
        self.config = self.root / "run.json"
        self.early = self.root / "early"
        self.halves = self.root / "halves"
        self.naive = self.root / "naive"
        self.retrained = self.root / "retrained"
        self.subspace = self.root / "subspace.safetensors"
        self.sources = {  # what the subspace was made of, where that is more than one
            source: self.root / f"subspace-{source}.safetensors"
            for source in ("weights", "self-contrast")
        }
        self.own_text = self.root / "own-text.safetensors"  # text of the base model
        self.reads = self.root / "reads.safetensors"  # where the adapter of the retraining reads
        self.figures = self.root / "figures"
        self.report_text = self.root / "report.md"
        self.report = self.root / "report.json"  # written last: the run is finished
        self.work = self.root / "work"  # Trainer checkpoints, removed with the stage they serve

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out; the operating system frees the lock of a dead one.

        Raises:
            RuntimeError: another process works in this folder.
        """
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.root / ".lock", timeout=0):
                self._remove_partial()
                yield
        except Timeout:
            raise RuntimeError(
                f"Another run is at work in {self.root}: wait for it, or choose another output."
            ) from None

    def _remove_partial(self) -> None:
        """Remove what a killed process was writing."""
        for partial in list(self.root.rglob(".*.partial")):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)  # it may have lain in one of the folders

    def check(self, config: RunConfig, fingerprints: dict[str, str]) -> None:
        """An unfinished run in this folder must be the same run.

        Raises:
            ValueError: the first option or input that differs, and both values.
        """
        if not self.config.exists():
            artefacts = (
                self.early,
                self.halves,
                self.naive,
                self.subspace,
                self.retrained,
                self.report,
            )
            if foreign := [path.name for path in artefacts if path.exists()]:
                raise ValueError(
                    f"The output folder {self.root} has a {foreign[0]} but no run.json that says "
                    "how it was made: choose an empty or a new folder."
                )
            return
        begun = json.loads(self.config.read_text(encoding="utf-8"))
        now = _record(config, fingerprints)
        for name in (option.name for option in fields(RunConfig)):
            old, new = begun["config"].get(name), now["config"][name]
            if name not in (*_INPUTS, "output") and old != new:
                raise ValueError(
                    f"The run in {self.root} was begun with {name} = {old!r}, not {new!r}: repeat "
                    "that value to go on with it, or choose another output folder."
                )
        for name in _INPUTS:
            if begun["fingerprints"].get(name) != now["fingerprints"].get(name):
                raise ValueError(
                    f"The run in {self.root} was begun with another content of {name} "
                    f"({begun['config'][name]}) than {now['config'][name]} has now: restore it to "
                    "go on, or choose another output folder."
                )

    @cached_property
    def day(self) -> date:
        """When the run was begun: what a chat template that writes a date is given."""
        begun = json.loads(self.config.read_text(encoding="utf-8")) if self.config.exists() else {}
        return date.fromisoformat(begun.get("day", date.today().isoformat()))

    def claim(self, config: RunConfig, fingerprints: dict[str, str]) -> None:
        """Note down what this run is."""
        if not self.config.exists():
            write_json(self.config, {**_record(config, fingerprints), "day": str(self.day)})


def _record(config: RunConfig, fingerprints: dict[str, str]) -> dict[str, Any]:
    record = {"grasp_kernels": __version__, "config": asdict(config), "fingerprints": fingerprints}
    return json.loads(json.dumps(record))  # tuples become lists, as they are when read back


def write_json(path: Path, value: Any) -> None:
    """Write `value` whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write one line of JSON for each value, whole or not at all."""
    write_text(path, "".join(f"{json.dumps(value)}\n" for value in values))


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, or of the checkpoint files in a folder (of large ones both ends)."""
    path = Path(path)
    files = [path] if path.is_file() else sorted({f for p in _MODEL_FILES for f in path.glob(p)})
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= _HASHED_WHOLE:
                digest.update(stream.read())
            else:
                digest.update(stream.read(_END))
                stream.seek(-_END, os.SEEK_END)
                digest.update(stream.read())
    return digest.hexdigest()
