"""Watch in transformers.Trainer: what it logs, where, and when it stops a training."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import grasp_kernels as gk
from grasp_kernels.data import collate
from grasp_kernels.training.watch import Watch
from tests.helpers.comparisons import assert_same_logits, logits
from tests.helpers.models import tiny_model, tokens
from tests.helpers.trainers import SHORT

WIDTH = 32


@pytest.fixture
def model() -> PeftModel:
    """An untrained adapter with dropout on a tiny Llama."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
    return get_peft_model(tiny_model(), config)


def subspace_of(model: PeftModel) -> gk.Subspace:
    direction = torch.nn.functional.normalize(torch.arange(1.0, WIDTH + 1), dim=0)[:, None]
    return gk.Subspace(direction)


def trainer_of(model: PeftModel, output: Path, steps: int = 6, **options: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 8).tolist()]
    settings: dict[str, Any] = {
        **SHORT,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        **options,
    }
    callbacks = settings.pop("callbacks", None)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output), **settings),
        train_dataset=rows,
        data_collator=partial(collate, pad_token_id=0),
        callbacks=callbacks,
    )


def test_a_projected_training_is_logged_every_few_steps(model: PeftModel, tmp_path: Path) -> None:
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace_of(model)))
    trainer = trainer_of(model, tmp_path, callbacks=[Watch(every=4)])
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["step"] for e in entries if "leakage" in e] == [4, 6]
    for entry in (entries[3], entries[5]):
        assert entry["leakage"] <= 1e-6


def test_a_stock_training_is_measured_along_a_given_subspace(
    model: PeftModel, tmp_path: Path
) -> None:
    subspace = subspace_of(model)
    callback = Watch(subspace, every=2)
    trainer = trainer_of(model, tmp_path, logging_steps=3, callbacks=[callback])
    trainer.train()
    measured = [e for e in trainer.state.log_history if "leakage" in e]
    assert [e["step"] for e in measured] == [3, 6]  # with the next log entry
    assert measured[1]["leakage"] == max(gk.leakage(model, subspace).values()) > 1e-3


def test_an_untrained_adapter_leaks_nothing(model: PeftModel) -> None:
    measured = Watch(subspace_of(model)).measure(model)
    assert measured == {"leakage": 0.0}


def test_measuring_leaves_model_and_random_state_alone(model: PeftModel) -> None:
    subspace = subspace_of(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    model.train()
    frozen = next(p for n, p in model.named_parameters() if "layers.1" in n and "lora_A" in n)
    frozen.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    Watch().measure(model)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert model.active_adapters == ["default"]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    model(input_ids=tokens(), labels=tokens()).loss.backward()  # nothing kept forbids training


def test_checkpoints_hold_closed_factors(model: PeftModel, tmp_path: Path) -> None:
    subspace = subspace_of(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(model, tmp_path, **options, callbacks=[Watch()])
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert max(gk.leakage(checkpoint, subspace).values()) <= 1e-6
    stock = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "checkpoint-6")).eval()
    assert_same_logits(logits(model), logits(stock), stock)


def test_a_resumed_training_measures_at_the_same_steps(model: PeftModel, tmp_path: Path) -> None:
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace_of(model)))
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "steps": 8}
    callbacks: list[TrainerCallback] = [Watch(every=2)]
    trainer = trainer_of(model, tmp_path, **options, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=_half_of(model, tmp_path, options))
    log = trainer.state.log_history
    assert [e["step"] for e in log if "leakage" in e] == [2, 4, 6, 8]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert [e["step"] for e in state["log_history"] if "leakage" in e] == [2]


def _half_of(model: PeftModel, output: Path, options: dict[str, Any]) -> str:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    callback = Watch(every=2)
    trainer_of(model, output, **options, callbacks=[callback, Stop()]).train()
    return str(output / "checkpoint-3")


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_gradient_that_is_no_number_stops_before_the_step(
    model: PeftModel, tmp_path: Path, number: str
) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    calls: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        last = torch.tensor([3])
        return gradient.index_fill(0, last, float(number)) if len(calls) == 3 else gradient

    model.get_parameter(name).register_hook(spoil)
    trainer = trainer_of(model, tmp_path, callbacks=[Watch()])
    with pytest.raises(
        FloatingPointError, match=r"gradient became (nan|inf) at step 3 of 6.*lower the learning"
    ):
        trainer.train()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_logged_loss_that_is_no_number_stops(model: PeftModel) -> None:
    state = TrainerState(global_step=5, max_steps=9)
    with pytest.raises(FloatingPointError, match=r"loss became nan at step 5 of 9: lower"):
        Watch().on_log(None, state, None, logs={"loss": float("nan")}, model=model)  # type: ignore[arg-type]


def test_overflowing_gradients_are_left_to_the_loss_scaler(model: PeftModel) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    half, full = (type("Arguments", (), {"fp16": on})() for on in (True, False))
    callback: Any = Watch()
    callback.on_pre_optimizer_step(half, TrainerState(), None, model=model)
    with pytest.raises(FloatingPointError):
        callback.on_pre_optimizer_step(full, TrainerState(), None, model=model)


def test_without_bases_numbers_are_watched_alone(model: PeftModel, tmp_path: Path) -> None:
    gk.apply_grasp(model)
    trainer = trainer_of(model, tmp_path, steps=1, callbacks=[Watch(every=1)])
    trainer.train()
    assert not any("leakage" in e for e in trainer.state.log_history)


def test_what_cannot_be_measured_is_refused(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="every is 0"):
        Watch(every=0)


def test_two_active_adapters_are_refused_before_a_step(model: PeftModel, tmp_path: Path) -> None:
    """What leaks is asked of one adapter, and would else stop the training where it is measured."""
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    callbacks = [Watch(subspace_of(model), every=2)]
    made = trainer_of(model, tmp_path, callbacks=callbacks)
    with pytest.raises(ValueError, match=r"default, other are active at once.*set_adapter"):
        made.train()
    assert made.state.global_step == 0
