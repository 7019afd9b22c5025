"""Stopped anywhere, a run goes on to the same end; and one folder holds one run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_kernels.run import RunConfig, run
from grasp_kernels.run.folder import RunFolder, fingerprint
from grasp_kernels.run.training import last_checkpoint
from grasp_kernels.subspace import Subspace

pytest_plugins = ("fixtures_run",)

ADAPTER_FILES = (
    "early/step-2/adapter_model.safetensors",
    "halves/half-1/adapter_model.safetensors",
    "halves/half-2/adapter_model.safetensors",
    "naive/adapter_model.safetensors",
    "naive/adapter_config.json",
    "naive/training_log.json",
    "retrained/adapter_model.safetensors",
    "retrained/adapter_config.json",
    "retrained/training_log.json",
)

_DRIVER = """
import importlib, json, os, signal, sys
import torch
torch.set_num_threads(1)  # forked processes must not inherit a pool of threads
options, points = json.loads(sys.argv[1])
import matplotlib.figure, peft, transformers  # once, before the processes are forked
import grasp_kernels.run.figures, grasp_kernels.identification
import grasp_kernels.layers.replacement
import grasp_kernels.run.training
from grasp_kernels.run import RunConfig, run
config = RunConfig(**options)

def kill_at(target, call):
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), []
    def wrapper(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)
    setattr(owner, name, wrapper)

for point in (*points, None):
    child = os.fork()
    if child == 0:
        if point is not None:
            kill_at(*point)
        run(config)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != (0 if point is None else -signal.SIGKILL):
        sys.exit(f"{point}: exit status {status}")
"""

# (function, which call of it) at which the process is killed; the next one goes on from there
KILL_POINTS = (
    ("grasp_kernels.run.folder:write_json", 1),  # before anything is there
    ("grasp_kernels.run.callback:GraspCallback.on_log", 5),  # in the naive training
    ("transformers:TrainerState.save_to_json", 2),  # a checkpoint without its last file
    ("grasp_kernels.run.training:write_json", 2),  # the finished adapter without its log
    ("grasp_kernels.run.callback:GraspCallback.on_log", 3),  # on the second half of the data
    ("grasp_kernels.subspace.basis:Subspace.save", 1),
    ("grasp_kernels.run.callback:GraspCallback.on_log", 4),  # in the retraining
    ("transformers:TrainerState.save_to_json", 3),
    ("grasp_kernels.run.report:write_json", 1),
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")
def test_killed_in_every_stage_a_run_ends_the_same(finished: RunConfig, tmp_path: Path) -> None:
    folders = (finished.output, tmp_path / "killed")
    options = {**vars(finished), "output": str(folders[1])}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps([options, KILL_POINTS])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ADAPTER_FILES:
        expected = (Path(finished.output) / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == expected, name
    one, other = (Subspace.load(Path(f) / "subspace.safetensors") for f in folders)
    assert (one.evidence, one.reasons) == (other.evidence, other.reasons)
    assert all(torch.equal(one.write[name], other.write[name]) for name in one.write)
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_half_written_checkpoints_are_removed(tmp_path: Path) -> None:
    for step, state in ((9, "{}"), (10, '{"global'), (11, None)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        if state is not None:
            (checkpoint / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-9"]
    assert last_checkpoint(tmp_path / "missing") is None


# --- one folder, one run


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate = 0.02, not 0.001"),
        ({"k": "auto"}, "k = 1, not 'auto'"),
        ({"early_checkpoints": (0.5,)}, r"early_checkpoints = \[0.2\], not \[0.5\]"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    finished: RunConfig, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        run(replace(finished, **options))


def test_changed_data_is_refused_and_moved_data_is_not(finished: RunConfig, tmp_path: Path) -> None:
    moved = tmp_path / "moved.jsonl"
    shutil.copy(finished.data, moved)
    assert run(replace(finished, data=str(moved))).output == Path(finished.output)
    moved.write_text(moved.read_text(encoding="utf-8").replace("red", "blue"), encoding="utf-8")
    with pytest.raises(ValueError, match="another content of data"):
        run(replace(finished, data=str(moved)))


def test_artefacts_of_unknown_origin_are_refused(run_config: RunConfig) -> None:
    (Path(run_config.output) / "naive").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has a naive but no run\.json"):
        run(run_config)


def test_second_process_is_kept_out_and_a_stale_lock_is_not(finished: RunConfig) -> None:
    folder = RunFolder(finished.output)
    with folder.lock(), pytest.raises(RuntimeError, match="Another run is at work"):
        run(finished)
    assert (Path(finished.output) / ".lock").exists()
    assert run(finished).output == Path(finished.output)


def test_fingerprint_sees_both_ends_of_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grasp_kernels.run.folder._HASHED_WHOLE", 10)
    monkeypatch.setattr("grasp_kernels.run.folder._END", 4)
    file = tmp_path / "model.safetensors"
    seen = set()
    for content in (b"0123456789ab", b"X123456789ab", b"0123456789aX", b"0123456789abc"):
        file.write_bytes(content)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 4


def test_what_a_killed_process_left_is_removed_also_inside_of_what_it_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    inside = folder.root / ".subspace.partial"
    inside.mkdir(parents=True)
    (inside / ".plot.png.partial").write_bytes(b"half")
    (folder.root / ".report.json.partial").write_bytes(b"half")
    with folder.lock():
        assert not list(folder.root.rglob("*.partial"))
