"""Options of a run from everywhere: its own and Trainer's, in Python, a file or a command."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import grasp_kernels as gk
from grasp_kernels.cli import main
from grasp_kernels.pipeline.config import OPTIONS
from grasp_kernels.pipeline.trainer_options import OWNED, as_typed, parse
from grasp_kernels.pipeline.training import check_trainer, training_arguments

pytest_plugins = ("tests.helpers.runs",)

COMMAND = ["run", "--model", "m", "--data", "d", "--output", "o"]


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[gk.RunConfig]:
    """The configurations that `run` is called with, which does nothing."""
    seen: list[gk.RunConfig] = []

    def record(config: gk.RunConfig) -> Any:
        seen.append(config)
        raise ValueError("enough")

    monkeypatch.setattr("grasp_kernels.pipeline.stages.run", record)
    return seen


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# --- those of transformers


def test_every_option_of_transformers_is_taken_or_owned() -> None:
    """What is neither an option of the run nor set by it is taken, with its default as typed."""
    own = {option.name for option in OPTIONS}
    taken = set()
    for option in (option for option in fields(TrainingArguments) if option.default is not None):
        if option.name not in own and not OWNED.fullmatch(option.name):
            value = getattr(option.default, "value", option.default)
            assert parse(as_typed(option.name, value)) == {option.name: value}
            taken.add(option.name)
    assert {"adam_beta2", "label_smoothing_factor", "optim", "bf16", "torch_compile"} <= taken


def test_options_of_transformers_reach_the_optimizer(
    tiny_model_dir: Path, chat_jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    further = {"adam_beta2": 0.5, "optim": "sgd", "optim_args": "momentum=0.25"}
    files = {"model": tiny_model_dir, "data": chat_jsonl, "output": tmp_path / "out"}
    config = gk.RunConfig(
        **{name: str(path) for name, path in files.items()},
        max_steps=2,
        naive_steps=2,
        training_arguments=further,
    )
    seen: list[dict[str, Any]] = []

    class Momentum(torch.optim.SGD):
        def step(self, *arguments: Any, **options: Any) -> Any:
            seen.append({**self.defaults})
            return super().step(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.optim.SGD", Momentum)
        report = gk.run(config)
    assert [one["momentum"] for one in seen] == [0.25] * 4
    assert report.numbers["config"]["training_arguments"] == further
    noted = json.loads((report.output / "run.json").read_text(encoding="utf-8"))
    assert noted["config"]["training_arguments"] == further
    for other in ({}, {**further, "adam_beta2": 0.9}):
        with pytest.raises(
            ValueError, match=r"was started with adam_beta2 = 0\.5, not adam_beta2 = (0\.9|None)"
        ):
            gk.run(config, training_arguments=other)
    assert gk.run(config).numbers == report.numbers
    command = ["run", "--max-steps", "2", "--naive-steps", "2", "--optim", "sgd"]
    command += ["--optim-args", "momentum=0.25"]
    for name, path in files.items():
        command += [f"--{name}", str(path)]
    assert main([*command, "--adam-beta2", ".25"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "was started with --adam-beta2 0.5, not --adam-beta2 0.25: repeat that value" in said
    assert main([*command, "--adam-beta2", ".5"]) == 0


def test_a_schedule_with_what_it_needs(run_config: gk.RunConfig, tmp_path: Path) -> None:
    wsd = replace(run_config, lr_scheduler_type="warmup_stable_decay")
    with pytest.raises(ValueError, match=r"'warmup_stable_decay' .*\(.*num_decay_steps"):
        check_trainer(wsd, 20)
    told = replace(wsd, training_arguments={"lr_scheduler_kwargs": {"num_decay_steps": 7}})
    check_trainer(told, 20)
    assert training_arguments(told, 20, tmp_path).lr_scheduler_kwargs == {"num_decay_steps": 7}


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"learning_rate": 1.0}, "learning_rate is an option of the run"),
        ({"output_dir": "x"}, "output_dir is set by the run itself"),
        ({"save_strategy": "no"}, "save_strategy is set by the run itself"),
        ({"fsdp": "full_shard"}, "fsdp is set by the run itself"),
        ([("adam_beta2", 0.9)], "training_arguments is"),
        ({"adam_beta2": float("nan")}, "training_arguments is"),
        ({"optim": object()}, "training_arguments is"),
    ],
)
def test_options_that_a_run_sets_itself_are_refused(further: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.RunConfig(model="m", data="d", output="o", training_arguments=further)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (
            {"adam_beta3": 0.9},
            r"adam_beta3 = 0\.9 .*\(--adam_beta3=0\.9: unrecognized",
        ),
        ({"adam_beta2": "x"}, "--adam-beta2: invalid float value: 'x'"),
        ({"adam_beta2": 1.5}, r"adam_beta2 = 1.5 .*\(Invalid beta parameter"),
        (
            {"bf16": "perhaps"},
            r"bf16 = 'perhaps' .*\(--bf16: Truthy value expected",
        ),
        ({"lr_scheduler_kwargs": [3]}, r"lr_scheduler_kwargs = \[3\] cannot be used here"),
        (
            {"bf16": True, "fp16": True},
            r"bf16 = True and fp16 = True .*\(At most one",
        ),
        ({"optim": "galore_adamw"}, "optim = 'galore_adamw' cannot be used here"),
    ],
)
def test_options_that_transformers_does_not_take_are_named_before_anything_is_written(
    further: Any, message: str, run_config: gk.RunConfig
) -> None:
    with pytest.raises(ValueError, match=message):
        gk.run(run_config, training_arguments=further)
    assert not Path(run_config.output).exists()


def test_they_are_typed_by_their_names(
    configured: list[gk.RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {"adam_beta2": 0.95, "bf16": True, "lr_scheduler_kwargs": {"num_cycles": 2}}
    words = ["--adam-beta2", ".95", "--bf16", "--lr-scheduler-kwargs", '{"num_cycles": 2}']
    underscored = [word.replace("-", "_").replace("__", "--") for word in words]
    for typed in (words, underscored):
        main([*COMMAND, *typed, "--max_steps", "3", "--target-modules", "o_proj", "v_proj"])
        assert configured.pop() == gk.RunConfig(
            model="m",
            data="d",
            output="o",
            max_steps=3,
            target_modules=("o_proj", "v_proj"),
            training_arguments=expected,
        )
    capsys.readouterr()
    for wrong, message in {
        "--adam-beta2 x": "--adam-beta2: invalid float value: 'x' (see grasp-kernels run -h).",
        "--learning-rat 3": "--learning-rat 3: unrecognized arguments (see ",
        "--logging-steps 3": "--logging-steps is set by the run itself, to compare and resume: ",
        "--project x": "--project is set by the run itself",
        "3": "3: unrecognized arguments",
    }.items():
        assert main([*COMMAND, *wrong.split()]) == 2
        assert error(capsys).startswith(message)
    assert configured == []


# --- a file


def test_options_of_a_file_are_those_that_are_typed(
    tmp_path: Path, configured: list[gk.RunConfig]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndata: d\noutput: o\nlearning_rate: 1e-5  # text to YAML 1.1\northogonal: false\n"
        "k: 3\ntarget_modules: [o_proj]\nbf16: true\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nadam-beta1: 0.5\nmax_steps: 9\n"
    )
    main(["run", "--config", str(path)])
    expected = gk.RunConfig(
        model="m",
        data="d",
        output="o",
        learning_rate=1e-5,
        orthogonal=False,
        k=3,
        target_modules=("o_proj",),
        max_steps=9,
        training_arguments={
            "adam_beta1": 0.5,
            "bf16": True,
            "lr_scheduler_kwargs": {"num_cycles": 2},
        },
    )
    assert configured.pop() == expected
    main(["run", "--orthogonal", "--adam-beta1", ".25", "--config", str(path), "--max-steps", "4"])
    further = {**expected.training_arguments, "adam_beta1": 0.25}
    typed = {"orthogonal": True, "max_steps": 4, "training_arguments": further}
    assert configured.pop() == replace(expected, **typed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: x", "--modle=x: unrecognized"),
        ("adam_beta2: x", "--adam-beta2: invalid float value: 'x'"),
        ("k: [1, 2]", "unrecognized arguments: 2"),
        ("k: 1.5", "--k: '1.5' is not a number"),
        ("k: true", "--k: expected one argument"),
        ("max_steps: {a: 1}", "--max-steps: invalid int value"),
        ("orthogonal: 3", "--orthogonal/--no-orthogonal: ignored explicit argument '3'"),
        ("neutral:", "neutral has no value: give one, or leave it out."),
        ("debug: true", "--debug: invalid DebugOption value: 'True'"),
        ("config: x", "--config=x: unrecognized"),
        ("3: 4", "--3=4: unrecognized"),
        ("k: 1\nr: 4\nk: 2", "k is there twice: remove one of them."),
        ("max_steps: 1\nmax-steps: 2", "max_steps is there twice"),
        ("- k", "holds no options: give a line such as max_steps: 200 for each."),
        ("", "holds no options"),
        (
            "k: 1\nr: [1",
            "is not YAML (line 2: expected ',' or ']', but got '<stream end>'): correct",
        ),
        (
            "k: !!python/object:os.system 1",
            "is not YAML (line 1: could not determine a constructor",
        ),
        ("k: \x00", "is not YAML ("),
        (b"k: \xff", "is not YAML ("),
        ("k: 2024-13-01", "is not YAML (month must be in 1..12)"),
        ("[" * 700, "is not YAML ("),
    ],
)
def test_a_file_with_anything_else_is_one_sentence_with_its_name(
    content: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([*COMMAND, "--config", str(path)]) == 2
    assert (said := error(capsys)).startswith(str(path)) and message in said
    assert not Path("o").exists()


def test_a_file_that_is_not_there_or_leaves_something_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    assert main([*COMMAND, "--config", str(path)]) == 2
    assert error(capsys) == f"There is no file {path}: check the option --config."
    path.write_text("model: m\ndata: d")
    assert main(["run", "--config", str(path)]) == 2
    assert error(capsys).startswith("the following arguments are required: --output")


# --- Python, and other versions


def test_run_takes_options_or_a_configuration(run_config: gk.RunConfig) -> None:
    options = {option.name: getattr(run_config, option.name) for option in OPTIONS}
    for other, message in (
        ({"max_steps": 0}, "max_steps is 0"),
        ({"data": "nowhere"}, "There is no file nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            gk.run(**{**options, **other})
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            gk.run(run_config, **other)


def test_a_run_of_another_version_is_named(run_config: gk.RunConfig) -> None:
    output = Path(run_config.output)
    output.mkdir()
    older = {"steps": 3, "batch_size": 4, "model": "m"}
    note = {"grasp_kernels": "0.1.0", "config": older, "fingerprints": {"model": "x"}}
    (output / "run.json").write_text(json.dumps(note))
    with pytest.raises(
        ValueError, match=r"options of another version of grasp_kernels \(0\.1\.0\)"
    ):
        gk.run(run_config)
    assert [path.name for path in output.iterdir()] == ["run.json"]
