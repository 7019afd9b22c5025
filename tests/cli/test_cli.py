"""Every subcommand through `main`: what it writes, prints and returns."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_kernels import RunConfig
from grasp_kernels.cli import main
from grasp_kernels.config import BACKENDS
from grasp_kernels.models.checkpoint import load_model
from grasp_kernels.pipeline.inputs import attach_lora
from grasp_kernels.subspace import Subspace

pytest_plugins = ("tests.helpers.runs",)

WIDTH = 32


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose writers all write along the first axis, beside a little noise."""
    folder = tmp_path_factory.mktemp("cli") / "adapter"
    config = RunConfig(model="m", data="d", output="o", r=4)
    model = attach_lora(load_model(tiny_model_dir, "auto"), config, str(tiny_model_dir))
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.01, generator=generator)
            if "o_proj" in name or "down_proj" in name:
                weight.data[0] += 1.0
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def axis(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Subspace file of the first axis at every writer."""
    path = tmp_path_factory.mktemp("cli") / "axis.safetensors"
    Subspace(torch.eye(WIDTH)[:, :1].contiguous()).save(path)
    return path


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from grasp_kernels.cli import main\n"
        "try: main(['run', '-h'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--target-modules" in done.stdout


def test_run_takes_its_options_and_defaults_from_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import grasp_kernels.pipeline.stages

    seen: list[RunConfig] = []

    def record(config: RunConfig) -> Any:
        seen.append(config)
        raise ValueError("enough")

    monkeypatch.setattr(grasp_kernels.pipeline.stages, "run", record)
    paths = ["run", "--model", "m", "--data", "d", "--output", "o"]
    main(paths)
    assert seen.pop() == RunConfig(model="m", data="d", output="o")
    options = "--k 3 --no-orthogonal --max-steps 9 --neutral n"
    main([*paths, *options.split(), "--target-modules", "o_proj", "down_proj"])
    assert seen.pop() == RunConfig(
        model="m",
        data="d",
        output="o",
        k=3,
        orthogonal=False,
        max_steps=9,
        target_modules=("o_proj", "down_proj"),
        neutral="n",
    )


@pytest.mark.slow
def test_run_prints_where_its_results_are(
    tiny_model_dir: Path,
    chat_jsonl: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["run", "--model", str(tiny_model_dir), "--data", str(chat_jsonl)]
    command += ["--output", str(tmp_path / "out"), "--max-steps", "2", "--r", "2"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "The naive LoRA answers" in first and "The retrained LoRA answers" in first
    assert str(tmp_path / "out" / "report.html") in first
    assert main(command) == 0
    assert "already finished; nothing was done" in capsys.readouterr().out
    assert main([*command, "--seed", "5"]) == 2
    assert "error: The run in" in (errors := capsys.readouterr().err)
    assert "--seed 0, not --seed 5" in errors
    assert "Traceback" not in errors


def test_stopped_run_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import grasp_kernels.pipeline.stages

    def stop(config: RunConfig) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(grasp_kernels.pipeline.stages, "run", stop)
    assert main(["run", "--model", "m", "--data", "d", "--output", "o"]) == 130
    assert "the same command continues from the last checkpoint" in capsys.readouterr().err


def test_identify_finds_the_planted_axis(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "subspace.safetensors"
    assert main(["identify", str(adapter), "--output", str(out), "--k", "1"]) == 0
    subspace = Subspace.load(out)
    assert subspace.basis[0].abs().item() > 0.99
    assert subspace.summary() in capsys.readouterr().out


def test_inspect_finds_the_base_model_that_an_adapter_names(
    adapter: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, config = tmp_path / "named", json.loads((adapter / "adapter_config.json").read_text())
    shutil.copytree(adapter, named)
    for base, status, said in (
        (str(tiny_model_dir), 0, "0 of the training data; grasp_kernels 0.1.0, torch"),
        ("somebody/something", 2, "'somebody/something', which is not a folder here: add --base-"),
        (None, 2, "None, which is not a folder here: add --base-model"),
    ):
        config["base_model_name_or_path"] = base
        (named / "adapter_config.json").write_text(json.dumps(config))
        assert main(["inspect", str(named)]) == status
        assert said in "".join(capsys.readouterr())
    command = ["inspect", str(named), "--base-model", str(tiny_model_dir)]
    config["base_model_name_or_path"] = "another"
    (named / "adapter_config.json").write_text(json.dumps(config))
    assert main(command) == 0
    assert "names the base model 'another', and " in capsys.readouterr().out
    assert main([*command, "--arm", "good"]) == 2
    assert "--arm chooses answers of data: add --data." in capsys.readouterr().err


def test_check_fails_before_and_passes_after_project(
    adapter: Path, axis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    projected = tmp_path / "projected"
    assert main(["check", str(adapter), str(axis)]) == 1
    assert "above the tolerance 0.004" in capsys.readouterr().out
    assert main(["project", str(adapter), str(axis), "--output", str(projected)]) == 0
    assert main(["check", str(projected), str(axis), "--tolerance", "1e-5"]) == 0
    assert "within the tolerance" in capsys.readouterr().out


def test_doctor_says_which_kernels_nobody_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from grasp_kernels.ops.lora_linear import registry

    untimed = "runs; never timed on such a GPU, so auto does not choose it"
    monkeypatch.setattr(registry, "backends", lambda: dict.fromkeys(registry.BACKENDS))
    for hopper, kernels in ((False, untimed), (True, "runs")):
        monkeypatch.setattr(registry, "measured_on", lambda where, is_it=hopper: is_it)
        assert main(["doctor"]) == 0
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        found = {line[1]: line[2] for line in lines if line[0] == "backend"}
        assert found.pop("auto").startswith("chooses kernels" if hopper else "chooses aten")
        expected = dict.fromkeys(registry.KERNELS, kernels)
        assert found == expected | dict.fromkeys(("aten", "reference"), "runs")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (object, "compiled for torch 3.1"),
        (
            "built for torch 2.99, and torch is 3.1.4",
            "in Python, short ones two to three times slower: built for torch 2.99, and torch is "
            "3.1.4 (to compile them, install with a C++ compiler and with pip's "
            "--no-build-isolation)",
        ),
    ],
)
def test_doctor_says_whether_calls_are_compiled(
    found: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grasp_kernels.cli import machine_commands
    from grasp_kernels.layers import plan

    monkeypatch.setattr(plan, "compiled", lambda: found)
    monkeypatch.setattr(torch, "__version__", "3.1.4")
    assert machine_commands._calls() == said


def test_doctor_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch              {torch.__version__.partition('+')[0]}" in printed
    assert all(f"backend {name}" in printed for name in BACKENDS)
    lines = {line[:17].strip(): line[17:].strip() for line in printed.splitlines()}
    if not torch.cuda.is_available():
        expected = "chooses aten: no kernel was measured to be faster here"
        assert expected in lines["backend auto"]


@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("2.9.1", "2.9.1, older than 2.10.0, the oldest that was tested"),
        ("2.10.0+cu128", "2.10.0+cu128, within 2.10.0 to 2.14.1"),
        ("2.14.1+cpu", "2.14.1+cpu, within 2.10.0 to 2.14.1"),
        ("2.14.2", "2.14.2, newer than 2.14.1, the newest that was tested"),
        ("2.100.0", "2.100.0, newer than 2.14.1, the newest that was tested"),
    ],
)
def test_doctor_says_how_a_release_stands_to_the_tested_ones(
    release: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grasp_kernels.cli import machine_commands

    monkeypatch.setitem(machine_commands.TESTED, "torch", ("2.10.0", "2.14.1"))
    monkeypatch.setattr(machine_commands, "version", lambda package: release)
    assert machine_commands._installed("torch") == said
    assert machine_commands._installed("safetensors") == release


@pytest.mark.parametrize(
    "command",
    [
        ["identify", "missing", "--output", "x.safetensors"],
        ["inspect", "missing"],
        ["check", "missing", "missing.safetensors"],
        ["project", "missing", "missing.safetensors", "--output", "x"],
        ["run", "--model", "missing/model/name", "--data", "d", "--output", "o"],
    ],
)
def test_missing_files_give_one_sentence(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "missing" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["identify", "ADAPTER"], "--output"),
        (["project", "ADAPTER", "AXIS"], "--output"),
        (["extract", "MODEL", "--base-model", "MODEL"], "--output"),
        (["inspect", "ADAPTER", "--base-model", "MODEL"], "--output"),
    ],
)
def test_outputs_are_refused_over_anything_before_any_work(
    command: list[str],
    option: str,
    adapter: Path,
    axis: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"ADAPTER": str(adapter), "AXIS": str(axis), "MODEL": str(tiny_model_dir)}
    given = [paths.get(word, word) for word in command]
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    inside = adapter / "adapter_model.safetensors"
    before = inside.read_bytes()
    for path, message in (
        (mine, "already exists"),
        (inside, "already exists"),
        ("", "is empty"),
        (mine / "x", "mine.txt'"),
    ):
        assert main([*given, option, str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {option}: ") and message in line
    assert mine.read_text() == "mine" and inside.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("identify a --output x --k x", "error: --k: 'x' is not a number: give one, or 'auto'"),
        ("run --model m --data d --output o --seed 4294967296", "--seed is 4294967296: give 0 to"),
        (
            "run --model m --data d --output o --k 17",
            "error: --k is 17, above the LoRA rank --r 16",
        ),
        ("run --model m --data d --output o --r 0", "error: --r is 0: give 1 or more"),
        ("run --model m --data d --output o --max-new-tokens 0", "error: --max-new-tokens is 0"),
        ("run --model m --data d --output=", "error: --output is ''"),
        ("run --model m --data d", "the following arguments are required: --output"),
    ],
)
def test_a_wrong_option_is_one_line_that_spells_it_as_it_is_typed(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert list(tmp_path.iterdir()) == []


def test_remedies_are_options() -> None:
    from grasp_kernels.cli.options import as_options

    names = [*(option.name for option in fields(RunConfig)), "bf16"]
    for message, expected in {
        "No direction: use project_gradient = False, or x.": "use --no-project-gradient, or",
        "Nothing within max_length=3: raise max_length.": "--max-length 3: raise --max-length.",
        "target_modules = ['q_proj', 'o_proj'] adapts": "--target-modules q_proj o_proj adapts",
        "with bf16 = None, not bf16 = True: x": "with no --bf16, not --bf16: x",
        "with learning_rate = 2e-05, not learning_rate = 1: x": "2e-05, not --learning-rate 1: x",
        'Two answers: give arm = "bad one".': "give --arm 'bad one'.",
        "There is no file d: check the option data.": "the option --data.",
    }.items():
        assert expected in as_options(message, names)
    for message in ("The model k isa", "/x/max_length/seed is 3", "'lora_alpha = 3' or rank"):
        assert as_options(message, names) == message


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        main(["inspect", "missing", "--debug"])


def test_library_that_is_missing_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "grasp_kernels.subspace", None)
    assert main(["identify", "anything", "--output", "x.safetensors"]) == 2
    assert "install grasp_kernels with its extra 'train'" in capsys.readouterr().err
