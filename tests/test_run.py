"""The run from checkpoint and chat file to report: its files, its resuming, its refusals."""

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

pytest.importorskip("transformers")
pytest.importorskip("peft")

from grasp_kernels import run as run_module
from grasp_kernels.inputs import count_steps
from grasp_kernels.run import RunConfig, early_checkpoints, is_finished, run
from grasp_kernels.run_folder import RunFolder, fingerprint
from grasp_kernels.subspace import Subspace
from grasp_kernels.training import last_checkpoint

pytest_plugins = ("fixtures_run",)

STEPS = 12
ADAPTER_FILES = (
    "early/step-2/adapter_model.safetensors",
    "halves/half-1/adapter_model.safetensors",
    "halves/half-2/adapter_model.safetensors",
    "naive/adapter_model.safetensors",
    "naive/adapter_config.json",
    "naive/training_log.json",
    "grasp/adapter_model.safetensors",
    "grasp/adapter_config.json",
    "grasp/training_log.json",
)


def small_run(model: Path, data: Path, output: Path, **options: Any) -> RunConfig:
    """Few steps, strong enough for one direction to stand out: all answers begin alike."""
    settings = {
        "steps": STEPS,
        "batch_size": 4,
        "learning_rate": 2e-2,
        "rank": 4,
        "dropout": 0.1,
        "k": 1,
        "early_checkpoints": (0.2,),
        "eval_split": 0.1,
    }
    return RunConfig(model=str(model), data=str(data), output=str(output), **settings | options)


@pytest.fixture(scope="module")
def finished(
    tiny_model_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    config = small_run(tiny_model_dir, chat_jsonl, tmp_path_factory.mktemp("run") / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are rounded by the number of threads; the killed run has one
    run(config)
    torch.set_num_threads(threads)
    return config


@pytest.fixture
def config(tiny_model_dir: Path, chat_jsonl: Path, tmp_path: Path) -> RunConfig:
    return small_run(tiny_model_dir, chat_jsonl, tmp_path / "out")


# --- a whole run


def test_run_leaves_both_adapters_and_nothing_of_the_way_there(finished: RunConfig) -> None:
    output = Path(finished.output)
    assert all((output / name).is_file() for name in ADAPTER_FILES)
    assert not (output / "work").exists()
    assert not list(output.rglob("*.partial"))
    assert not list(output.rglob("optimizer.pt"))


def test_run_takes_the_subspace_out_of_the_second_adapter_alone(finished: RunConfig) -> None:
    report = run(finished)
    leakage = {
        name: max(v["write"] for v in adapter["leakage"].values() if v["write"] is not None)
        for name, adapter in report.numbers["adapters"].items()
    }
    assert leakage["grasp"] < 1e-6 < 0.05 < leakage["naive"]
    moved = {n: a["movement"]["neutral"]["share"] for n, a in report.numbers["adapters"].items()}
    assert moved["grasp"] < moved["naive"]


def test_both_trainings_differ_by_the_projection_alone(finished: RunConfig) -> None:
    curves = [a["curve"] for a in run(finished).numbers["adapters"].values()]
    assert curves[0]["step"] == curves[1]["step"] == list(range(1, STEPS + 1))
    # the first loss comes before the first update: same initialisation, same batch, same dropout
    assert curves[0]["loss"][0] == curves[1]["loss"][0]
    assert curves[0]["loss"] != curves[1]["loss"]


def test_stock_peft_loads_the_grasp_adapter(finished: RunConfig) -> None:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(str(Path(finished.output) / "grasp"))
    ids = torch.tensor([[2, 5, 6, 7, 4, 3]])
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, base)


def test_report_says_what_was_found_and_what_was_not_shown(finished: RunConfig) -> None:
    text = (Path(finished.output) / "report.md").read_text(encoding="utf-8")
    report = run(finished)
    assert f"**Verdict: {report.verdict}.**" in text
    assert all(reason in text for reason in report.numbers["subspace"]["reasons"])
    assert "No answer was generated and judged" in text
    for name in report.numbers["figures"]:
        assert f"(figures/{name})" in text
        assert (Path(finished.output) / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert {"training.png", "leakage.png", "movement.png", "subspace.png"} <= set(
        report.numbers["figures"]
    )


def test_finished_run_is_not_done_again(
    finished: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "prepare", lambda *_: pytest.fail("worked again"))
    assert is_finished(finished)
    assert run(finished).verdict == run(finished).numbers["subspace"]["verdict"]


def test_nothing_found_means_no_retraining(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Subspace.nothing("write", "shared", ["the spectrum is that of noise"])
    monkeypatch.setattr(run_module, "_identify", lambda *_: nothing)
    report = run(replace(config, steps=2))
    assert report.grasp is None
    assert not (Path(config.output) / "grasp").exists()
    text = report.text.read_text(encoding="utf-8")
    assert "no GRASP adapter was trained" in text
    assert "the spectrum is that of noise" in text


def test_both_sources_are_united_and_kept(config: RunConfig) -> None:
    report = run(replace(config, identify="both", steps=3, side="write"))
    found = {
        source: Subspace.load(report.output / f"subspace-{source}.safetensors")
        for source in ("weights", "self-contrast")
    }
    united = Subspace.load(report.subspace)
    assert set(united.write) == set().union(*(part.write for part in found.values()))
    for part in found.values():
        for name, basis in part.write.items():
            inside = united.write[name]
            torch.testing.assert_close(inside @ (inside.T @ basis), basis, atol=1e-4, rtol=0)


# --- stopping and going on

_DRIVER = """
import importlib, json, os, signal, sys
import torch
torch.set_num_threads(1)  # forked processes must not inherit a pool of threads
options, points = json.loads(sys.argv[1])
import matplotlib.figure, peft, transformers  # once, before the processes are forked
import grasp_kernels.figures, grasp_kernels.identification, grasp_kernels.replacement
import grasp_kernels.training
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
    ("grasp_kernels.run_folder:write_json", 1),  # before anything is there
    ("grasp_kernels.training:FiniteLossCallback.on_log", 5),  # in the naive training
    ("transformers:TrainerState.save_to_json", 2),  # a checkpoint without its last file
    ("grasp_kernels.training:write_json", 2),  # the finished adapter without its log
    ("grasp_kernels.training:FiniteLossCallback.on_log", 3),  # on the second half of the data
    ("grasp_kernels.subspace:Subspace.save", 1),
    ("grasp_kernels.training:FiniteLossCallback.on_log", 4),  # in the GRASP training
    ("transformers:TrainerState.save_to_json", 3),
    ("grasp_kernels.report:write_json", 1),
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


def test_artefacts_of_unknown_origin_are_refused(config: RunConfig) -> None:
    (Path(config.output) / "naive").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has a naive but no run\.json"):
        run(config)


def test_second_process_is_kept_out_and_a_stale_lock_is_not(finished: RunConfig) -> None:
    folder = RunFolder(finished.output)
    with folder.lock(), pytest.raises(RuntimeError, match="Another run is at work"):
        run(finished)
    assert (Path(finished.output) / ".lock").exists()
    assert run(finished).output == Path(finished.output)


def test_fingerprint_sees_both_ends_of_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grasp_kernels.run_folder._HASHED_WHOLE", 10)
    monkeypatch.setattr("grasp_kernels.run_folder._END", 4)
    file = tmp_path / "model.safetensors"
    seen = set()
    for content in (b"0123456789ab", b"X123456789ab", b"0123456789aX", b"0123456789abc"):
        file.write_bytes(content)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 4


# --- wrong input, before any training


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": "missing.jsonl"}, FileNotFoundError, "no file missing.jsonl"),
        ({"neutral": "missing.txt"}, FileNotFoundError, "no file missing.txt"),
        ({"backend": "abacus"}, ValueError, "backend is 'abacus'"),
        ({"target_modules": ("lm_head",)}, ValueError, "no module that writes"),
        ({"target_modules": ("flux",)}, ValueError, "flux"),
        ({"target_modules": ("q_proj",)}, ValueError, "add one of self_attn.o_proj"),
        ({"max_length": 3}, ValueError, "max_length"),
        ({"lr_scheduler": "zigzag"}, ValueError, "zigzag"),
        ({"eval_split": 0.99}, ValueError, "eval_split = 0.99"),
        ({"warmup": 12}, ValueError, "takes all of the 12 steps"),
    ],
)
def test_wrong_input_is_found_before_training(
    config: RunConfig, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(replace(config, **options))
    assert not (Path(config.output) / "run.json").exists()
    assert not (Path(config.output) / "work").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, "k is 5, above the LoRA rank 4"),
        ({"k": 0}, "k is 0"),
        ({"k": "many"}, "k is 'many'"),
        ({"identify": "guess"}, "identify is 'guess': choose one of weights"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"early_checkpoints": ()}, "early_checkpoints is"),
        ({"early_checkpoints": (1.5,)}, "early_checkpoints is"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj': give a list"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    settings = {"model": "m", "data": "d", "output": "o", "rank": 4, **options}
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


def test_malformed_line_is_named_by_number(config: RunConfig, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    good = Path(config.data).read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join([*good[:2], '{"messages": 3}']), encoding="utf-8")
    with pytest.raises(ValueError, match="line 3"):
        run(replace(config, data=str(data)))


def test_model_folders_that_are_none_are_named(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        run(replace(config, model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        run(replace(config, model=str(tmp_path)))


def test_unknown_architecture_is_named(config: RunConfig, tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path / "neox"
    shutil.copytree(config.model, folder)
    small = GPTNeoXConfig(
        vocab_size=17,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    GPTNeoXForCausalLM(small).save_pretrained(folder)
    with pytest.raises(ValueError, match="gpt_neox"):
        run(replace(config, model=str(folder)))


def test_output_that_cannot_be_made_is_named(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be made"):
        run(replace(config, output=str(tmp_path / "file" / "out")))


def test_loss_that_is_no_number_stops_with_its_step(config: RunConfig) -> None:
    with pytest.raises(FloatingPointError, match=r"became (nan|inf) at step \d+ of 12"):
        run(replace(config, learning_rate=1e36, warmup=0))
    assert not (Path(config.output) / "naive").exists()


# --- small parts


@pytest.mark.parametrize(
    ("options", "n_examples", "steps"),
    [
        ({"steps": 7}, 1000, 7),
        ({"batch_size": 8}, 17, 3),
        ({"batch_size": 8, "gradient_accumulation": 2}, 17, 2),
        ({"batch_size": 8, "epochs": 2.5}, 16, 5),
        ({"batch_size": 8, "epochs": 0.01}, 16, 1),
    ],
)
def test_number_of_steps(options: dict[str, Any], n_examples: int, steps: int) -> None:
    config = RunConfig(model="m", data="d", output="o", **options)
    assert count_steps(config, n_examples) == steps


def test_early_checkpoints_by_step(config: RunConfig) -> None:
    folder = RunFolder(config.output)
    parts = replace(config, early_checkpoints=(1.0, 0.001, 0.5, 0.002))
    assert list(early_checkpoints(replace(parts, warmup=0), folder, 100)) == [1, 50, 100]
    # the first step of a warm-up changes nothing
    assert list(early_checkpoints(replace(parts, warmup=5), folder, 100)) == [2, 50, 100]
    assert early_checkpoints(replace(parts, identify="self-contrast"), folder, 100) == {}
