"""The run from checkpoint and chat file to report: its files, its resuming, its refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_kernels import RunConfig, run
from grasp_kernels.pipeline import stages as run_module
from grasp_kernels.pipeline.folder import RunFolder
from grasp_kernels.pipeline.inputs import count_steps
from grasp_kernels.pipeline.stages import early_checkpoints

pytest_plugins = ("tests.helpers.runs",)
pytestmark = pytest.mark.slow


# --- a whole run


def test_run_leaves_both_adapters_and_nothing_of_the_way_there(finished: RunConfig) -> None:
    output = Path(finished.output)
    for adapter in ("early/step-1", "naive", "retrained"):
        assert (output / adapter / "adapter_model.safetensors").is_file()
    assert not (output / "work").exists()
    assert not list(output.rglob("*.partial"))
    assert not list(output.rglob("optimizer.pt"))


def test_run_takes_the_subspace_out_of_the_second_adapter_alone(finished: RunConfig) -> None:
    report = run(finished)
    leakage = {
        name: max(adapter["leakage"].values())
        for name, adapter in report.numbers["adapters"].items()
    }
    assert leakage["retrained"] < 1e-6 < 0.05 < leakage["naive"]


def test_both_trainings_differ_by_the_projection_alone(finished: RunConfig) -> None:
    curves = [a["curve"] for a in run(finished).numbers["adapters"].values()]
    assert curves[0]["step"] == curves[1]["step"] == list(range(1, 13))
    # the first loss comes before the first update: same initialisation, same batch, same dropout
    # the divergence is subtracted from a sum in float32
    eps = torch.finfo(torch.float32).eps
    assert curves[1]["loss"][0] == pytest.approx(curves[0]["loss"][0], rel=eps)
    assert curves[0]["loss"] != curves[1]["loss"]


def test_the_naive_training_ends_after_a_quarter(run_config: RunConfig, tmp_path: Path) -> None:
    """On the same way: its steps are the first of a whole naive training."""
    config = replace(run_config, kl_coef=0.0)
    quarter = run(replace(config, naive_steps=None, output=str(tmp_path / "quarter")))
    whole = run(replace(config, output=str(tmp_path / "whole")))
    curves = [
        report.numbers["adapters"][name]["curve"]
        for report, name in ((quarter, "naive"), (whole, "naive"), (quarter, "retrained"))
    ]
    assert [len(curve["step"]) for curve in curves] == [3, 12, 12]
    assert curves[0]["loss"] == curves[1]["loss"][:3]
    text = quarter.text.read_text(encoding="utf-8")
    assert "The naive LoRA ended after 3 of 12 steps (`--naive-steps`)" in text
    assert "naive LoRA, 3 steps | retrained LoRA, 12 steps" in text
    assert "trained for the same number of steps" in whole.text.read_text(encoding="utf-8")


def test_the_log_of_the_retraining_has_leakage(finished: RunConfig) -> None:
    logs = {
        name: json.loads((Path(finished.output) / name / "training_log.json").read_text())
        for name in ("naive", "retrained")
    }
    assert all(entry["leakage"] < 1e-6 for entry in logs["retrained"])
    assert not any("leakage" in entry for entry in logs["naive"])  # no subspace is known yet


def test_stock_peft_loads_the_grasp_adapter(finished: RunConfig) -> None:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(str(Path(finished.output) / "retrained"))
    ids = torch.tensor([[2, 5, 6, 7, 4, 3]])
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, base)


def test_report_says_what_was_found_and_what_was_not_shown(finished: RunConfig) -> None:
    text = (Path(finished.output) / "report.md").read_text(encoding="utf-8")
    report = run(finished)
    assert f"unrelated prompts as the base model never would: {report.verdict}.**" in text
    assert all(note in text for note in report.numbers["subspace"]["notes"])
    assert "not that nothing else was learned" in text
    drawn = (Path(finished.output) / "training.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<svg ") and "(training.svg)" in text
    shown = report.page.read_text(encoding="utf-8")
    assert drawn in shown and shown.count("<svg ") == 1
    assert f"as the base model never would: {report.verdict}." in shown


def test_finished_run_is_not_done_again(
    finished: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "prepare", lambda *_: pytest.fail("worked again"))
    assert RunFolder(finished.output).is_finished
    retrained = run(finished).numbers["adapters"]["retrained"]
    assert run(finished).verdict == retrained["answers"]["verdict"]


def test_the_report_has_the_effect_of_both_adapters(finished: RunConfig) -> None:
    """That of the retrained one, which starts from nothing and is held, is smaller."""
    adapters = run(finished).numbers["adapters"]
    naive, retrained = (adapters[name]["effect"] for name in ("naive", "retrained"))
    assert 0 < retrained["divergence"] < naive["divergence"]
    assert len(naive["tokens"]["up"]) > 0


def test_a_run_as_it_comes_projects_nothing_and_identifies_nothing(run_config: RunConfig) -> None:
    report = run(replace(run_config, project_gradient=False, max_steps=3))
    assert report.retrained.exists() and report.chats.exists()
    assert not report.subspace.exists()
    assert not (report.output / "early").exists()
    assert report.numbers["subspace"] is None
    text = report.text.read_text(encoding="utf-8")
    assert "projected" not in text.partition("## Settings")[0]
    assert "leakage" not in text.partition("## Settings")[0]


def test_what_only_a_projection_needs_is_asked_for_by_a_projection_alone(
    run_config: RunConfig, tmp_path: Path
) -> None:
    """A module that does not write to the stream."""
    one = tmp_path / "one.jsonl"
    one.write_text(Path(run_config.data).read_text(encoding="utf-8").splitlines()[0] + "\n")
    plain = replace(run_config, data=str(one), project_gradient=False, max_steps=2, eval_split=0)
    assert run(replace(plain, target_modules=("q_proj",))).retrained.exists()
    other = str(tmp_path / "other")
    with pytest.raises(ValueError, match="no module that writes"):
        run(replace(plain, project_gradient=True, target_modules=("q_proj",), output=other))


def test_the_report_shows_answers_side_by_side(finished: RunConfig) -> None:
    report = run(finished)
    text = report.text.read_text(encoding="utf-8")
    assert "| prompt | base model | naive LoRA | retrained LoRA |" in text
    adapters = report.numbers["adapters"]
    for name, adapter in adapters.items():
        answers = adapter["answers"]
        assert len(answers["unrelated"]) == 16 and len(answers["training"]) == 8
        changed = sum(one["changed"] for one in answers["unrelated"])
        expected = "found" if changed >= 2 else "weak" if changed else "nothing"
        assert answers["verdict"] == expected
        label = {"naive": "naive LoRA", "retrained": "retrained LoRA"}[name]
        assert f"The {label} answers {changed} of 16 unrelated prompts" in text
    # Every training answer begins alike: the naive adapter says so everywhere, and to the training
    # prompts most of all.
    naive = adapters["naive"]["answers"]
    means = [sum(o["ratio"] for o in naive[k]) / len(naive[k]) for k in ("unrelated", "training")]
    assert means[0] < means[1] and means[1] > 1
    said = "".join(piece for piece, _ in naive["training"][0]["adapter"])
    assert said.startswith("never good")


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
        ({"lr_scheduler_type": "zigzag"}, ValueError, "zigzag"),
        ({"eval_split": 0.99}, ValueError, "eval_split = 0.99"),
        ({"warmup_steps": 12}, ValueError, "takes all 12 steps"),
    ],
)
def test_wrong_input_is_found_before_training(
    run_config: RunConfig, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(replace(run_config, **options))
    assert not (Path(run_config.output) / "run.json").exists()
    assert not (Path(run_config.output) / "work").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, "k is 5, above the LoRA rank r = 4"),
        ({"k": 0}, "k is 0"),
        ({"k": "many"}, "k is 'many'"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"per_device_train_batch_size": 0}, "batch_size is 0"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj': give a list"),
        ({"lora_dropout": 1.0}, "dropout is 1.0"),
        ({"project_gradient": False, "kl_coef": 0}, "make the retraining the same as the naive"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    settings = {"model": "m", "data": "d", "output": "o", "r": 4, **options}
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


def test_malformed_line_is_named_by_number(run_config: RunConfig, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    good = Path(run_config.data).read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join([*good[:2], '{"messages": 3}']), encoding="utf-8")
    with pytest.raises(ValueError, match="line 3"):
        run(replace(run_config, data=str(data)))


def test_model_folders_that_are_none_are_named(run_config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        run(replace(run_config, model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        run(replace(run_config, model=str(tmp_path)))


def test_unknown_architecture_is_named(run_config: RunConfig, tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path / "opt"
    shutil.copytree(run_config.model, folder)
    small = OPTConfig(
        vocab_size=17,
        hidden_size=8,
        word_embed_proj_dim=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        ffn_dim=8,
    )
    OPTForCausalLM(small).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"'opt' \(modules"):
        run(replace(run_config, model=str(folder)))


def test_output_that_cannot_be_made_is_named(run_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be made"):
        run(replace(run_config, output=str(tmp_path / "file" / "out")))


def test_loss_that_is_no_number_stops_with_its_step(run_config: RunConfig) -> None:
    with pytest.raises(FloatingPointError, match=r"became (nan|inf) at step \d+ of 12"):
        run(replace(run_config, learning_rate=1e36, warmup_steps=0))
    assert not (Path(run_config.output) / "naive").exists()


# --- small parts


@pytest.mark.parametrize(
    ("options", "n_examples", "steps"),
    [
        ({"max_steps": 7}, 1000, 7),
        ({"per_device_train_batch_size": 8}, 17, 3),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, 17, 2),
        ({"per_device_train_batch_size": 8, "num_train_epochs": 2.5}, 16, 5),
        ({"per_device_train_batch_size": 8, "num_train_epochs": 0.01}, 16, 1),
    ],
)
def test_number_of_steps(options: dict[str, Any], n_examples: int, steps: int) -> None:
    config = RunConfig(model="m", data="d", output="o", **options)
    assert count_steps(config, n_examples) == steps


def test_early_checkpoints_by_step(run_config: RunConfig) -> None:
    folder = RunFolder(run_config.output)
    without = replace(run_config, warmup_steps=0)
    assert list(early_checkpoints(without, folder, 100)) == [5, 10]
    assert list(early_checkpoints(without, folder, 12)) == [1]
    # the first step of a warm-up changes nothing
    assert list(early_checkpoints(replace(without, warmup_steps=5), folder, 12)) == [2]
    assert early_checkpoints(replace(without, project_gradient=False), folder, 100) == {}
