"""A run of two processes, as a launcher starts them: the files and, up to rounding, the adapters
and the report of one process with batches twice as large."""

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
from transformers import PreTrainedConfig, PreTrainedModel

from grasp_kernels import RunConfig, processes, run
from grasp_kernels.models.sharding import split_loading
from tests.helpers.oracle import relative_error
from tests.helpers.runs import small_run

pytest_plugins = ("tests.helpers.runs",)
pytestmark = pytest.mark.slow
SECONDS = 300


FSDP2 = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}}
needs_loading_in_parts = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"),
    reason="this transformers loads whole models",
)


def launched(
    config: RunConfig, launcher: dict[str, Any] | None = None, **variables: str
) -> subprocess.Popen[str]:
    """Start the command in two processes of torchrun, or of accelerate with its configuration."""
    options = {name: value for name, value in asdict(config).items() if value is not None}
    options = {**options, "target_modules": list(config.target_modules)}
    options |= options.pop("training_arguments")
    file = Path(config.output).with_suffix(".yaml")  # torchrun takes --r for an option of its own
    file.write_text(yaml.safe_dump(options), encoding="utf-8")
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    if launcher is not None:
        asked = file.with_suffix(".accelerate.yaml")
        asked.write_text(yaml.safe_dump(launcher), encoding="utf-8")
        command = ["accelerate.commands.launch", "--config_file", str(asked)]
        command += ["--main_process_port", "0"]
    command += ["-m", "grasp_kernels", "run", "--config", str(file)]
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def finish(started: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = started.communicate(timeout=SECONDS)
    return started.returncode, out, err


def kill_in_retraining(started: subprocess.Popen[str], config: RunConfig) -> None:
    end = time.monotonic() + SECONDS
    while not list(Path(config.output).glob("work/retrained/checkpoint-3/whole")):
        assert time.monotonic() < end
        assert started.poll() is None, started.communicate()
        time.sleep(0.02)
    for process in psutil.Process(started.pid).children(recursive=True):
        process.kill()
    started.communicate()


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
        eval_split=1 / 3,
        per_device_train_batch_size=8,
        training_arguments=optimizer,
    )


@pytest.fixture(
    scope="module",
    params=[None, pytest.param(FSDP2, marks=needs_loading_in_parts)],
    ids=["ddp", "fsdp2"],
)
def two(config: RunConfig, request: pytest.FixtureRequest) -> RunConfig:
    """The folder of a run of two processes: DDP by torchrun, FSDP2 by accelerate."""
    half = config.per_device_train_batch_size // 2
    both = replace(
        config,
        output=str(Path(config.output).parent / ("two" if request.param is None else "split")),
        per_device_train_batch_size=half,
    )
    status, out, err = finish(launched(both, request.param))
    assert status == 0, err
    assert out.count("Report:") == 1  # the first process speaks for all
    return both


def test_two_processes_make_what_one_makes(config: RunConfig, two: RunConfig) -> None:
    alone = run(config)
    chats = [load_file(Path(made.output) / "chats.safetensors") for made in (config, two)]
    for part, tensor in chats[0].items():
        if tensor.is_floating_point():
            # float32 logits of batches of other sizes
            error, largest = (chats[1][part] - tensor).abs().max(), tensor.abs().max()
            assert error <= 16 * torch.finfo(torch.float32).eps * largest
        else:
            assert torch.equal(chats[1][part], tensor)
    numbers = json.loads((Path(two.output) / "report.json").read_text("utf-8"))
    assert numbers["steps"] == alone.numbers["steps"]
    for name in ("naive", "retrained"):
        ours, theirs = (adapter(made.output, name) for made in (two, config))
        assert ours.keys() == theirs.keys()
        error = max(relative_error(ours[key], theirs[key]) for key in theirs)
        assert error < 1e-3, name
        told, expected = (report["adapters"][name] for report in (numbers, alone.numbers))
        assert told["curve"]["loss"] == pytest.approx(expected["curve"]["loss"], rel=1e-4)
        assert told["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-4)
        assert told["effect"]["divergence"] == pytest.approx(
            expected["effect"]["divergence"], rel=1e-2
        )
        answers = [[a["adapter"] for a in t["answers"]["unrelated"]] for t in (told, expected)]
        assert answers[0] == answers[1]
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
    kill_in_retraining(launched(both), both)
    with pytest.raises(ValueError, match="were begun by 2 processes, not by 1"):
        run(both)
    status, _, err = finish(launched(both))
    assert status == 0, err
    for name in ("naive", "retrained"):
        ours, theirs = adapter(both.output, name), adapter(whole.output, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@needs_loading_in_parts
def test_the_training_of_a_split_model_goes_on(config: RunConfig, tmp_path: Path) -> None:
    """Killed in the retraining: it ends as one process does."""
    both = replace(
        config, output=str(tmp_path / "out"), per_device_train_batch_size=4, save_steps=3
    )
    kill_in_retraining(launched(both, FSDP2), both)
    status, _, err = finish(launched(both, FSDP2))
    assert status == 0, err
    run(config)
    for name in ("naive", "retrained"):
        ours, theirs = adapter(both.output, name), adapter(config.output, name)
        assert max(relative_error(ours[key], theirs[key]) for key in theirs) < 1e-3, name


@pytest.mark.parametrize(
    ("launcher", "wrong", "said"),
    [
        (None, {"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr"),
        pytest.param(
            FSDP2, {"target_modules": ["nowhere"]}, "nowhere", marks=needs_loading_in_parts
        ),
    ],
    ids=["ddp", "fsdp2"],
)
def test_wrong_input_ends_all_processes(
    config: RunConfig,
    tmp_path: Path,
    launcher: dict[str, Any] | None,
    wrong: dict[str, Any],
    said: str,
) -> None:
    """The first process alone says it, once."""
    status, _, err = finish(
        launched(replace(config, output=str(tmp_path / "out"), **wrong), launcher)
    )
    assert status != 0
    assert err.count("error: ") == 1
    assert said in err
    assert not (tmp_path / "out").exists()


ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 1, .* set fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, .* use --multi_gpu, or FSDP"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism_config, .* --multi_gpu"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision, .* give the run a dtype"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend, .* leave it out"),
        ({**ASKED, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params, .* leave it out"),
        ({**ASKED, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "the option gradient_checkpointing"),
    ],
)
def test_other_ways_to_split_a_model_are_refused(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], sentence: str
) -> None:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        run(replace(config, output=f"{config.output}-refused"))
    assert not Path(f"{config.output}-refused").exists()


@needs_loading_in_parts
def test_quantised_weights_are_not_split() -> None:
    config = PreTrainedConfig(quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=r"are quantised, .* --multi_gpu"):
        split_loading(config)


def test_variables_of_other_launchers_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert (processes.count(), processes.index(), processes.local_index()) == (1, 0, 0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (processes.count(), processes.index()) == (8, 3)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 7])
def test_processes_make_equally_many_parts(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    made = []
    for name, value in (("WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    for index in range(3):
        monkeypatch.setenv("RANK", str(index))
        made.append(processes.shares(total))
    assert {part for parts in made for part in parts} == set(range(total))
    assert len(set(map(len, made))) == 1
