"""Stopped anywhere, a run goes on to the same end; and one folder holds one run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grasp_kernels import RunConfig, run
from grasp_kernels.pipeline import stages
from grasp_kernels.pipeline.folder import RunFolder, fingerprint
from grasp_kernels.pipeline.interrupts import raise_if_interrupted
from grasp_kernels.pipeline.training import _Steps, last_checkpoint
from grasp_kernels.regularizer import KLRegularizer
from grasp_kernels.subspace import Subspace

pytest_plugins = ("tests.helpers.runs",)
pytestmark = pytest.mark.slow

ADAPTER_FILES = (
    "early/step-1/adapter_model.safetensors",
    "naive/adapter_model.safetensors",
    "naive/adapter_config.json",
    "naive/training_log.json",
    "retrained/adapter_model.safetensors",
    "retrained/adapter_config.json",
    "retrained/training_log.json",
)

_ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "training_log.json")

_DRIVER = """
import importlib, json, os, signal, sys
import torch
torch.set_num_threads(1)  # forked processes must not inherit a pool of threads
options, points = json.loads(sys.argv[1])
import peft, transformers  # once, before the processes are forked
import grasp_kernels.pipeline.report, grasp_kernels.subspace
import grasp_kernels.layers.replacement
import grasp_kernels.pipeline.training
from grasp_kernels import RunConfig, run
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
    ("grasp_kernels.pipeline.folder:write_json", 1),  # before anything is there
    ("grasp_kernels.training.watch:Watch.on_log", 5),  # in the naive training
    ("transformers:TrainerState.save_to_json", 2),  # a checkpoint without its last file
    ("grasp_kernels.pipeline.training:write_json", 2),  # the finished adapter without its log
    ("grasp_kernels.subspace.basis:Subspace.save", 1),
    ("grasp_kernels.training.watch:Watch.on_log", 4),  # in the retraining
    ("transformers:TrainerState.save_to_json", 3),
    ("grasp_kernels.pipeline.report:write_json", 1),
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
    for found in (one, other):
        found.metadata.pop("adapters")  # folders of the two runs
    assert (one.notes, one.metadata) == (other.notes, other.metadata)
    assert torch.equal(one.basis, other.basis)
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_half_written_checkpoints_are_removed(tmp_path: Path) -> None:
    """Trainer's last file is not that of a process that is slower than the first."""
    for step, files in (
        (9, ("trainer_state.json", "whole")),
        (10, ("trainer_state.json",)),
        (11, ()),
    ):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in files:
            (checkpoint / name).write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-9"]
    assert last_checkpoint(tmp_path / "missing") is None


# --- one folder, one run


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate = 0.02, not learning_rate = 0.001"),
        ({"k": "auto"}, "k = 1, not k = 'auto'"),
        ({"target_modules": ("q_proj",)}, r"= \['all-linear'\], not target_modules = \['q_proj'\]"),
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
    with pytest.raises(ValueError, match="differs in content from"):
        run(replace(finished, data=str(moved)))


def test_prompts_that_were_not_there_are_refused(finished: RunConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("what is red\nwhat is blue\n", encoding="utf-8")
    with pytest.raises(ValueError, match="was started with neutral = None, not neutral = '"):
        run(replace(finished, neutral=str(prompts)))


def test_artefacts_of_unknown_origin_are_refused(run_config: RunConfig) -> None:
    (Path(run_config.output) / "naive").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"contains naive but no run\.json"):
        run(run_config)


def test_second_process_is_kept_out_and_a_stale_lock_is_not(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_stages", lambda *_: None)
    monkeypatch.setattr(stages.Report, "load", lambda path: path)
    folder = RunFolder(run_config.output)
    for _ in range(2):  # new, and begun
        with folder.lock(), pytest.raises(RuntimeError, match="Another run is using"):
            run(run_config)
        assert run(run_config) == folder.report
        assert (folder.root / ".lock").exists()


def test_fingerprint_sees_both_ends_of_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grasp_kernels.pipeline.folder._HASHED_WHOLE", 10)
    monkeypatch.setattr("grasp_kernels.pipeline.folder._END", 4)
    file = tmp_path / "model.safetensors"
    seen = set()
    for content in (b"0123456789ab", b"X123456789ab", b"0123456789aX", b"0123456789abc"):
        file.write_bytes(content)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 4


def test_what_a_killed_process_left_is_removed_once_the_run_is_known_to_be_the_same(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_stages", lambda *_: None)
    monkeypatch.setattr(stages.Report, "load", lambda path: path)
    run(run_config)
    folder = RunFolder(run_config.output)
    ours = [f"{name}.abcdefg_.partial" for name in (".naive", "early/.step-2")]
    theirs = ["a/.naive.abcdefg_.partial", ".big.partial", ".other.abcdefg_.partial"]
    for name in (*ours, *theirs):
        (folder.root / name).mkdir(parents=True)
        (folder.root / name / "half").write_text("")
    with pytest.raises(ValueError, match="started with seed"):
        run(replace(run_config, seed=1))
    assert all((folder.root / name).exists() for name in (*ours, *theirs))
    run(run_config)
    assert [name for name in (*ours, *theirs) if (folder.root / name).exists()] == theirs


@pytest.mark.parametrize("name", ["notes.txt", "work/notes.txt", "report.md"])
def test_a_folder_with_files_of_somebody_else_is_left_alone(
    run_config: RunConfig, name: str
) -> None:
    mine = Path(run_config.output, name)
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=rf"contains {Path(name).parts[0]} but no run\.json"):
        run(run_config)
    assert mine.read_text() == "mine"
    assert [path for path in Path(run_config.output).rglob("*") if path.is_file()] == [mine]


# --- what was cut short or deleted afterwards


@pytest.fixture
def copied(finished: RunConfig, tmp_path: Path) -> RunConfig:
    """The finished run, in a folder that a test may write into."""
    return replace(finished, output=str(shutil.copytree(finished.output, tmp_path / "copied")))


@pytest.mark.parametrize(
    ("name", "deleted"),
    [
        ("chats.safetensors", "chats.safetensors"),
        ("subspace.safetensors", "subspace.safetensors"),
        ("naive/adapter_model.safetensors", "naive"),
        ("retrained/training_log.json", "retrained"),
        ("early/step-1/adapter_model.safetensors", "step-1"),
        ("report.json", "report.json"),
    ],
)
def test_a_file_that_was_cut_short_is_named_with_what_to_delete(
    copied: RunConfig, name: str, deleted: str
) -> None:
    path = Path(copied.output, name)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"{path.name}.*: delete [^ ]*{deleted}, and the same"):
        run(copied)


def test_a_missing_part_of_an_adapter_is_named(copied: RunConfig) -> None:
    Path(copied.output, "naive", "training_log.json").unlink()
    with pytest.raises(ValueError, match=r"training_log\.json is missing: delete .*naive, and"):
        run(copied)


def test_a_run_whose_adapter_was_deleted_is_not_finished_and_makes_it_again(
    copied: RunConfig,
) -> None:
    for name in ("report.md", "training.svg", "retrained"):
        path = Path(copied.output, name)
        kept = path.rename(path.with_name("elsewhere"))
        assert not RunFolder(copied.output).is_finished
        if name != "retrained":
            kept.rename(path)
            assert RunFolder(copied.output).is_finished
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(copied)
    torch.set_num_threads(threads)
    assert RunFolder(copied.output).is_finished
    for name in _ADAPTER:
        assert Path(copied.output, "retrained", name).read_bytes() == (kept / name).read_bytes()


@pytest.mark.parametrize("text", ["{oops", "{}", "[]", '{"config": 3, "fingerprints": {}}'])
def test_a_run_json_that_says_nothing_is_named(copied: RunConfig, text: str) -> None:
    Path(copied.output, "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json.*: restore it, or choose another output"):
        run(copied)


NOTES: dict[str, list[Any]] = {
    "run.json": [{"fingerprints": 3}, {"day": 3}, {"day": ""}],
    "report.json": [{"adapters": 3}, {}],
    "naive/training_log.json": ["x", {}, [3], [{"step": 1}]],
    "naive/adapter_config.json": ["x", 3],
}


@pytest.mark.parametrize("name", NOTES)
def test_a_note_that_says_something_else_is_named(copied: RunConfig, name: str) -> None:
    path = Path(copied.output, name)
    whole = json.loads(path.read_text())
    if name != "report.json":
        Path(copied.output, "report.json").unlink()
    for change in NOTES[name]:
        is_part = isinstance(change, dict) and bool(change)
        path.write_text(json.dumps({**whole, **change} if is_part else change))
        with pytest.raises(ValueError, match=rf"{path.name}.*: (restore it|delete)"):
            run(copied)


@pytest.mark.parametrize(
    ("kind", "name", "part"),
    [
        (KLRegularizer, "chats.safetensors", "log_probs"),
        (KLRegularizer, "chats.safetensors", "documents"),
    ],
)
def test_chats_of_another_kind_are_named(
    copied: RunConfig, kind: Any, name: str, part: str
) -> None:
    path = Path(copied.output, name)
    with safe_open(path, framework="pt") as opened:
        texts = opened.metadata()
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if key.startswith(part))
    value = tensors[key]
    for other in (
        value.to(torch.float8_e4m3fn),
        value.float() * float("nan"),
        value[:0],
        value.flatten()[0].clone(),
    ):
        save_file({**tensors, key: other}, path, metadata=texts)
        with pytest.raises(ValueError, match=rf"{name}' holds no .*: give a file that .* again"):
            kind.load(path)


# --- stopped anywhere in a training


_AT_EVERY_CHANGE = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
options, root = json.loads(sys.argv[1])
from pathlib import Path
from grasp_kernels import RunConfig
from grasp_kernels.pipeline.inputs import prepare
from grasp_kernels.pipeline.training import train as train_one
config = RunConfig(**options)
inputs = prepare(config, Path(config.model))

def train(out, last_step):
    train_one(config, inputs, out=out, work=out.parent / "work", description=out.name,
              last_step=last_step)

def killed_at(change, out, last_step):
    seen, changes = [], ("os.mkdir", "os.rename", "os.rmdir", "shutil.rmtree")
    def hook(event, arguments):
        if event in changes and out.name in str(arguments):
            seen.append(event)
            if len(seen) == change:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    train(out, last_step)

for last_step in (5, 4):
    folder = Path(root, str(last_step))
    train(folder / "whole", last_step)
    for change in range(1, 99):
        child = os.fork()
        if child == 0:
            if not (folder / "killed").exists():
                killed_at(change, folder / "killed", last_step)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        if status != -signal.SIGKILL:
            sys.exit(f"change {change}: exit status {status}")
    print(change)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")
def test_killed_at_every_change_of_a_finished_adapter_a_training_takes_no_step_more(
    run_config: RunConfig, tmp_path: Path
) -> None:
    """Its last step ends no epoch, and the learning rate is constant: one step more would show."""
    options = replace(
        run_config,
        max_steps=5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        save_steps=2,
        eval_split=0,
    )
    done = subprocess.run(
        [sys.executable, "-c", _AT_EVERY_CHANGE, json.dumps([vars(options), str(tmp_path)])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(int(changes) >= 6 for changes in done.stdout.split()[-2:])
    for last_step in (5, 4):
        whole, killed = (tmp_path / str(last_step) / name for name in ("whole", "killed"))
        log = json.loads((whole / "training_log.json").read_text())
        assert [entry["step"] for entry in log] == list(range(1, last_step + 1))
        for name in _ADAPTER:
            assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_ctrl_c_that_python_drops_stops_the_training_all_the_same(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that comes while a progress bar is deleted."""
    # Of a process that runs tests for another one it is ignored.
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: dropped.append(told.exc_type))
    monkeypatch.setattr(stages, "make_chats", lambda *_: None)

    class Bar:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def at_step_2(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
        assert state.global_step <= 2
        if state.global_step == 2:
            Bar()

    monkeypatch.setattr(_Steps, "on_log", at_step_2)
    with pytest.raises(KeyboardInterrupt):
        run(replace(run_config, project_gradient=False, max_steps=4, save_steps=1))
    assert dropped == [KeyboardInterrupt]
    assert not Path(run_config.output, "naive").exists()
    assert last_checkpoint(Path(run_config.output, "work", "naive")) is not None
    raise_if_interrupted()  # it is of that run alone
