"""A run of two processes, as a launcher starts them: the files and, up to rounding, the adapters of
one process with batches twice as large."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from grasp_kernels import RunConfig, processes, run
from tests.helpers.oracle import relative_error
from tests.helpers.runs import small_run

pytest_plugins = ("tests.helpers.runs",)
pytestmark = pytest.mark.slow
SECONDS = 300


def launched(config: RunConfig, count: int = 2, **variables: str) -> subprocess.Popen[str]:
    """Start the command in processes of torchrun."""
    options = {name: value for name, value in asdict(config).items() if value is not None}
    options = {**options, "target_modules": list(config.target_modules)}
    options |= options.pop("training_arguments")
    file = Path(config.output).with_suffix(".yaml")  # torchrun takes --r for an option of its own
    file.write_text(yaml.safe_dump(options), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={count}", "-m", "grasp_kernels", "run"]
    command += ["--config", str(file)]
    return subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def finish(started: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = started.communicate(timeout=SECONDS)
    return started.returncode, out, err


def adapter(folder: str | Path, name: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / name / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("processes")
    made = small_run(tiny_model_dir, chat_jsonl, folder / "one")
    # Adam makes much of rounding; dropout has no common mask; both halves of a batch are whole.
    optimizer = {"optim": "sgd"}
    return replace(
        made,
        lora_dropout=0.0,
        learning_rate=1.0,
        eval_split=0.0,
        per_device_train_batch_size=8,
        training_arguments=optimizer,
    )


@pytest.fixture(scope="module")
def two(config: RunConfig) -> RunConfig:
    """The folder of a run of two processes."""
    half = config.per_device_train_batch_size // 2
    both = replace(
        config,
        output=str(Path(config.output).parent / "two"),
        per_device_train_batch_size=half,
    )
    status, out, err = finish(launched(both))
    assert status == 0, err
    assert out.count("Report:") == 1  # the first process speaks for all
    return both


def test_two_processes_make_what_one_makes(config: RunConfig, two: RunConfig) -> None:
    alone = run(config)
    chats = [load_file(Path(made.output) / "chats.safetensors") for made in (config, two)]
    for part, tensor in chats[0].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(chats[1][part], tensor, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(chats[1][part], tensor)
    numbers = json.loads((Path(two.output) / "report.json").read_text("utf-8"))
    assert numbers["steps"] == alone.numbers["steps"]
    for name in ("naive", "retrained"):
        ours, theirs = (adapter(made.output, name) for made in (two, config))
        assert ours.keys() == theirs.keys()
        error = max(relative_error(ours[key], theirs[key]) for key in theirs)
        assert error < 1e-3, name
        curves = [report["adapters"][name]["curve"] for report in (numbers, alone.numbers)]
        assert curves[0]["loss"] == pytest.approx(curves[1]["loss"], rel=1e-4)
    found, meant = (
        load_file(Path(made.output) / "subspace.safetensors")["basis"] for made in (two, config)
    )
    assert float((found.mT @ meant).abs().min()) > 1 - 1e-3  # one direction, of either sign


def test_the_folder_of_two_processes_is_that_of_one(config: RunConfig, two: RunConfig) -> None:
    run(config)
    names = [
        {path.relative_to(made.output) for path in Path(made.output).rglob("*")}
        for made in (config, two)
    ]
    assert names[0] == names[1]
    note = json.loads((Path(two.output) / "run.json").read_text("utf-8"))
    assert note["processes"] == 2


def test_a_finished_run_is_read_by_any_number(two: RunConfig) -> None:
    assert run(two).verdict in ("found", "weak", "nothing")


def test_a_training_goes_on_with_as_many_processes(config: RunConfig, tmp_path: Path) -> None:
    """Killed in the retraining: two go on to the same adapter, one is refused."""
    both = replace(
        config, output=str(tmp_path / "out"), per_device_train_batch_size=4, save_steps=1
    )
    whole = replace(both, output=str(tmp_path / "whole"))
    assert finish(launched(whole))[0] == 0
    started = launched(both)
    end = time.monotonic() + SECONDS
    while not list(Path(both.output).glob("work/retrained/checkpoint-3/trainer_state.json")):
        assert time.monotonic() < end
        assert started.poll() is None, started.communicate()
        time.sleep(0.02)
    for process in psutil.Process(started.pid).children(recursive=True):
        process.kill()
    started.communicate()
    with pytest.raises(ValueError, match="were begun by 2 processes, not by 1"):
        run(both)
    status, _, err = finish(launched(both))
    assert status == 0, err
    for name in ("naive", "retrained"):
        ours, theirs = adapter(both.output, name), adapter(whole.output, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_wrong_input_ends_all_processes(config: RunConfig, tmp_path: Path) -> None:
    wrong = replace(config, output=str(tmp_path / "out"), target_modules=("nothing",))
    status, _, err = finish(launched(wrong))
    assert status != 0
    assert err.count("error: ") >= 1
    assert "--target-modules" in err
    assert not (tmp_path / "out").exists()


def test_a_split_model_is_refused(config: RunConfig, tmp_path: Path) -> None:
    status, _, err = finish(
        launched(replace(config, output=str(tmp_path / "out")), ACCELERATE_USE_FSDP="true")
    )
    assert status != 0
    assert "a run keeps a whole model in each process" in err


def test_variables_of_other_launchers_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert (processes.count(), processes.index(), processes.local_index()) == (1, 0, 0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (processes.count(), processes.index()) == (8, 3)
