"""The folder of a run: the paths in it, the finished stages, and the lock.

A stage is finished if and only if its final artefact exists. An artefact appears whole: it is
written under another name in the same folder and then renamed. So a run can be stopped at any
moment, also by SIGKILL.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from grasp_kernels import processes
from grasp_kernels.files import check_own_folder, left_behind, open_tensors, read_json, write_json
from grasp_kernels.inert import shown
from grasp_kernels.models.checkpoint import FILES
from grasp_kernels.pipeline.config import RunConfig
from grasp_kernels.version import __version__

# Files up to this size are hashed whole. Of larger files (weights) only both ends are hashed:
# hashing the 16 GB of an 8B model takes a minute, and the header with all shapes is at the start.
_HASHED_WHOLE = 64 * 2**20
_END = 2**20
_INPUTS = ("model", "data", "neutral")  # compared by content, so that the files may be moved

LOG_NAME = "training_log.json"  # in the folder of a trained adapter, next to the weights
_LOGGED = {"step", "loss"}  # keys of the entry of each step
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_LOCK = ".lock"
_NOTE = "note of a run"
_UNKNOWN = "restore it, or choose another output folder"
_AGAIN = "delete {}, and the same command makes it again"


class RunFolder:
    """Hold the paths of a run below `root`; nothing is made before `lock`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "run.json"
        self.early = self.root / "early"
        self.naive = self.root / "naive"
        self.retrained = self.root / "retrained"
        self.subspace = self.root / "subspace.safetensors"
        self.chats = self.root / "chats.safetensors"  # text of the base model
        self.training_chart = self.root / "training.svg"
        self.report_text = self.root / "report.md"
        self.report_page = self.root / "report.html"
        self.report = self.root / "report.json"  # written last: the run is finished
        self.work = self.root / "work"  # Trainer checkpoints; removed when the stage ends

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder, and keep a second process out.

        The operating system frees the lock of a process that died.

        Raises:
            OSError: the folder cannot be made.
            RuntimeError: another process works in the folder.
        """
        from filelock import FileLock, Timeout

        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"The output folder {self.root} cannot be made ({error.strerror}): choose another "
                "one."
            ) from None
        try:
            with FileLock(self.root / _LOCK, timeout=0):
                yield
        except Timeout:
            raise RuntimeError(
                f"Another run is using {self.root}: wait until it has ended, or choose another "
                "output folder."
            ) from None

    def check(self, config: RunConfig, fingerprints: dict[str, str]) -> None:
        """Raise unless the folder is new, empty, or the folder of the same run.

        Nothing is changed.

        Raises:
            OSError: a folder that cannot be made or written.
            ValueError: the folder has other files; or an option or an input differs from the note.
                The message names the first such option or input, and both values.
        """
        if not self.config.exists():
            check_own_folder(self.root, self.config.name, beside=[_LOCK])
            return
        begun = read_json(self.config, _NOTE, _UNKNOWN)
        options, inputs = (begun.get(part) for part in ("config", "fingerprints"))
        known = isinstance(options, dict) and isinstance(inputs, dict)
        if not (known and isinstance(options.get("training_arguments", {}), dict)):
            raise ValueError(f"{self.config} does not say how the run was started: {_UNKNOWN}.")
        now = _record(config, fingerprints)
        if options.keys() != now["config"].keys():
            raise ValueError(
                f"The run in {self.root} was started with the options of another version of "
                f"grasp_kernels ({begun.get('grasp_kernels')}): choose another output folder."
            )
        # Options of transformers count by their own names.
        first, second = ({**o, **o["training_arguments"]} for o in (options, now["config"]))
        for name in {**second, **first}:
            old, new = first.get(name), second.get(name)
            is_file = name in _INPUTS and None not in (old, new)
            if old != new and not is_file and name not in ("output", "training_arguments"):
                raise ValueError(
                    f"The run in {self.root} was started with {name} = {old!r}, not "
                    f"{name} = {new!r}: repeat that value to continue the run, or choose another "
                    "output folder."
                )
        for name in _INPUTS:
            if inputs.get(name) != now["fingerprints"].get(name):
                raise ValueError(
                    f"{now['config'][name]} (the option {name}) differs in content from "
                    f"{options.get(name)} at the start of the run in {self.root}: restore that "
                    "content to continue the run, or choose another output folder."
                )
        self._check_artefacts()
        self._check_processes(begun.get("processes", 1))

    def _check_processes(self, before: int) -> None:
        """Raise if one of two trainings that belong together had other batches."""
        some = self.naive.exists() != self.retrained.exists()
        early = self.early.exists() and not self.retrained.exists()
        if (some or early or self.work.exists()) and before != processes.count():
            raise ValueError(
                f"The trainings in {self.root} were begun by {before} processes, not by "
                f"{processes.count()}, whose batches are others: start {before} to continue, or "
                "choose another output folder."
            )

    def _check_artefacts(self) -> None:
        """Raise for a file that is missing or cannot be read: a stage leaves its files whole."""
        for file in (self.chats, self.subspace):
            if file.exists():
                _check_whole(file, file)
        trained = [self.naive, self.retrained]
        for adapter in (*trained, *self.early.glob("step-*")):
            for name in (*_ADAPTER, *([LOG_NAME] if adapter in trained else [])):
                if adapter.exists():
                    _check_whole(adapter / name, adapter)

    @property
    def is_finished(self) -> bool:
        """Return whether the report is there, with the pages and adapters of the run.

        Raises:
            ValueError: a report that cannot be read.
        """
        if not (self.config.exists() and self.report.exists()):
            return False
        numbers = read_json(self.report, "report of a run", _AGAIN.format(self.report))
        if not isinstance(numbers.get("adapters"), dict):
            raise ValueError(f"{self.report} holds no report: {_AGAIN.format(self.report)}.")
        told = [self.root / name for name in numbers["adapters"]]
        told += [self.report_text, self.report_page, self.training_chart]
        return all(path.exists() for path in told)

    @cached_property
    def day(self) -> date:
        """Return the day on which the run was begun, for chat templates that write a date."""
        begun = read_json(self.config, _NOTE, _UNKNOWN) if self.config.exists() else {}
        day = begun.get("day", date.today().isoformat())
        try:
            return date.fromisoformat(day)
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.config} says day={shown(day)}, which is not a date: {_UNKNOWN}."
            ) from None

    def claim(self, config: RunConfig, fingerprints: dict[str, str]) -> None:
        """Write the note of this run, and remove files that killed processes left unfinished."""
        places = vars(self).values()
        ours = [path for path in places if isinstance(path, Path) and path.parent == self.root]
        for left in (left for path in ours for left in left_behind(path)):
            shutil.rmtree(left)
        for left in self.early.glob(".*.partial"):  # everything in this folder is ours
            shutil.rmtree(left)
        note = {"day": str(self.day), "processes": processes.count()}
        if not self.config.exists() or not self.naive.exists():
            write_json(self.config, {**_record(config, fingerprints), **note})


def _check_whole(file: Path, artefact: Path) -> None:
    remedy = _AGAIN.format(artefact)
    if not file.exists():
        raise ValueError(f"{file} is missing: {remedy}.")
    if file.name == LOG_NAME:
        entries = read_json(file, "training log", remedy, kind=list)
        if not all(isinstance(one, dict) and one.keys() >= _LOGGED for one in entries):
            raise ValueError(f"{file} lacks {' or '.join(sorted(_LOGGED))} for a step: {remedy}.")
    elif file.suffix == ".json":
        read_json(file, "configuration of an adapter", remedy)
    else:
        with open_tensors(file, remedy):
            pass


def _record(config: RunConfig, fingerprints: dict[str, str]) -> dict[str, Any]:
    record = {"grasp_kernels": __version__, "config": asdict(config), "fingerprints": fingerprints}
    return json.loads(json.dumps(record))  # tuples become lists, as in a file


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a file, or of the checkpoint files in a folder.

    Of large files only both ends are hashed.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted({f for p in FILES for f in path.glob(p)})
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
