"""GraspTrainer: the divergence in the loss, the chats it makes, and apply_grasp before it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

import grasp_kernels as gk
from grasp_kernels.data import collate, everyday_prompts, read_records, tokenize_records
from grasp_kernels.training.trainer import CHATS
from tests.helpers.kl_regularizer import examples, regularizer
from tests.helpers.models import tiny_model, tiny_peft_model
from tests.helpers.trainers import SHORT

pytest_plugins = ("tests.helpers.runs",)
SMALL: dict[str, Any] = {"num_documents": 12, "max_new_tokens": 6}


def trainer(
    model: PeftModel | None,
    folder: Path,
    accumulation: int = 1,
    kl: gk.KLRegularizer | None = None,
    **options: Any,
) -> gk.GraspTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
        remove_unused_columns=False,
        **SHORT,
    )
    torch.manual_seed(1)
    data: Any = examples()
    return gk.GraspTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=lambda rows: collate(rows, 0),
        kl_regularizer=kl,
        **{"grasp_config": gk.GraspConfig(kl_coef=0.0), **options},
    )


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_trainer_adds_it_and_logs_it(tmp_path: Path, accumulation: int) -> None:
    losses = {}
    for strength in (None, 0.0, 1.0):
        held = None if strength is None else regularizer(kl_coef=strength)
        made = trainer(tiny_peft_model(), tmp_path, accumulation, held)  # draws the data anew
        made.train()
        losses[strength] = [e for e in made.state.log_history if "loss" in e]
    plain, nothing, anchored = losses.values()
    assert not any("kl" in entry for entry in plain)
    assert [e["kl"] for e in nothing] == [0.0] * 3
    assert [e["loss"] for e in nothing] == [e["loss"] for e in plain]
    # before the first update everything else is the same
    first = anchored[0]
    assert first["kl"] > 1e-4
    # logged losses have four digits
    assert first["loss"] - first["kl"] == pytest.approx(plain[0]["loss"], abs=2e-4)


def test_a_step_of_fewer_batches_than_the_accumulation_weighs_it_as_any_other(
    tmp_path: Path,
) -> None:
    """All data are two batches, where eight are asked for."""
    found = []
    for strength in (None, 1.0):
        held = None if strength is None else regularizer(kl_coef=strength)
        made = trainer(tiny_peft_model(), tmp_path, 8, held)
        made.train_dataset = examples()[:8]
        made.train()
        found.append(next(e for e in made.state.log_history if "loss" in e))
    plain, anchored = found
    assert anchored["kl"] > 1e-4
    assert anchored["loss"] - anchored["kl"] == pytest.approx(plain["loss"], abs=2e-4)


@pytest.mark.parametrize(
    ("told", "counted", "expected"),
    [(None, None, False), (None, 5, True), (True, None, True), (False, 5, False)],
)
def test_the_trainer_says_whether_losses_are_parts_of_a_step(
    tmp_path: Path, told: bool | None, counted: int | None, expected: bool
) -> None:
    held = regularizer()
    made = trainer(tiny_peft_model(), tmp_path, 4, held)
    made.loss_is_scaled_for_ga = told
    made.current_gradient_accumulation_steps = 4
    ids = torch.tensor([[1, 2, 3, 4]])
    batch, model = {"input_ids": ids, "labels": ids}, made.model.train()
    plain = Trainer.compute_loss(made, model, batch, num_items_in_batch=counted)
    loss = made.compute_loss(model, batch, num_items_in_batch=counted)
    added = held.loss(model, 0).item() / (4 if expected else 1)
    assert (loss - plain).item() == pytest.approx(added, rel=1e-3)


def test_an_evaluation_is_without_it(tmp_path: Path) -> None:
    made = trainer(tiny_peft_model(), tmp_path)
    data: Any = examples()
    expected = made.evaluate(data)["eval_loss"]
    made.kl_regularizer = regularizer(kl_coef=100.0)
    assert made.evaluate(data)["eval_loss"] == expected


@pytest.mark.slow
def test_training_with_it_stays_nearer(tmp_path: Path) -> None:
    found = {}
    for strength in (0.0, 3.0):
        model = tiny_peft_model()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)  # as every adapter begins: at the base model
        torch.manual_seed(0)
        held = regularizer(kl_coef=strength)
        made = trainer(model, tmp_path, kl=held)
        made.args.max_steps = 30
        made.train()
        model.eval()
        torch.manual_seed(0)
        found[strength] = sum(regularizer(kl_coef=1.0).loss(model, step=i).item() for i in range(8))
    assert found[3.0] < 0.5 * found[0.0]


class Sft(gk.GraspTrainerMixin, SFTTrainer):
    """What the README tells a user of trl to write."""


def sft(model: Path, rows: Iterable[dict[str, Any]], folder: Path, **options: Any) -> Sft:
    settings = {"max_steps": 2, "save_steps": 1, **options.pop("settings", {})}
    torch.manual_seed(0)  # trl 1.0 makes the adapter before it sets its seed
    return Sft(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=SFTConfig(
            output_dir=str(folder),
            bf16=False,
            gradient_checkpointing=False,
            **SHORT,
            **settings,
        ),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        **options,
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_trl_trains_on_our_layers_and_chats(
    tiny_model_dir: Path, chat_jsonl: Path, tmp_path: Path
) -> None:
    made = sft(
        tiny_model_dir,
        rows_of(chat_jsonl),
        tmp_path,
        grasp_config=gk.GraspConfig(**SMALL, kl_coef=1.0),
    )
    layers = [m for m in made.model.modules() if isinstance(m, gk.GraspLoRALinear)]
    assert len(layers) == 3 * 7
    made.train()
    first, second = (e["kl"] for e in made.state.log_history if "loss" in e)
    assert first == pytest.approx(0, abs=1e-6)  # at the base model, up to float32's rounding
    assert second > 1e-4
    # The chats are those that the functions make which the trainer is made of.
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    records = read_records(chat_jsonl)
    tokenized, _ = tokenize_records(records, tokenizer, 1024)
    expected = gk.KLRegularizer.make(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        tokenized,
        neutral=everyday_prompts(records, tokenizer),
        num_documents=12,
        max_new_tokens=6,
        batch_size=2,
        seed=made.args.seed,
    )
    found = made.kl_regularizer
    assert found is not None
    assert found.batch_size == 1
    assert torch.equal(found.documents, expected.documents)
    assert torch.equal(found.counted, expected.counted)
    assert torch.equal(found.log_probs, expected.log_probs)


@pytest.mark.slow
def test_a_resumed_training_has_the_chats_that_it_had(
    tiny_model_dir: Path,
    chat_jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"grasp_config": gk.GraspConfig(**SMALL)}
    rows = rows_of(chat_jsonl)
    whole = sft(tiny_model_dir, rows, tmp_path / "whole", **options)
    whole.train()
    stopped = sft(tiny_model_dir, rows, tmp_path / "stopped", **options)
    stopped.add_callback(_StopAfterOne())
    stopped.train()

    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(gk.KLRegularizer, "make", forbidden)
    resumed = sft(tiny_model_dir, rows, tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "stopped" / CHATS).is_file()
    kl = [[e["kl"] for e in t.state.log_history if "kl" in e] for t in (whole, resumed)]
    assert kl[0] == kl[1]


class _StopAfterOne(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def test_chats_that_no_checkpoint_needs_leave_no_file(tmp_path: Path) -> None:
    made = trainer(tiny_peft_model(), tmp_path)
    made.grasp_config = gk.GraspConfig(**SMALL)
    made.train()
    assert made.kl_regularizer is not None
    assert not (tmp_path / CHATS).exists()


@pytest.mark.parametrize("system", [None, "three never good"])
def test_chats_open_as_token_ids_of_the_data_do(
    tiny_model_dir: Path, chat_jsonl: Path, tmp_path: Path, system: str | None
) -> None:
    """Of token ids nobody knows the system prompt, and everyday questions would be without it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    turns = [] if system is None else [{"role": "system", "content": system}]
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [*turns, *row["messages"]]} for row in rows_of(chat_jsonl)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenized, _ = tokenize_records(read_records(path), tokenizer, None)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    made = trainer(model, tmp_path, processing_class=tokenizer)
    made.grasp_config, made.train_dataset, made._rows = (
        gk.GraspConfig(**SMALL),
        tokenized,
        tokenized,
    )
    made.train()
    opening = tokenizer("<user>" if system is None else f"<system> {system} <end> <user>")
    found = made.kl_regularizer
    assert found is not None
    length = len(opening["input_ids"])
    assert (found.documents[:, :length] == torch.tensor(opening["input_ids"])).all()


def direction(model: PeftModel) -> gk.Subspace:
    return gk.Subspace(torch.eye(32)[:, :1])


@pytest.mark.parametrize("given", ["subspace", "file", "adapter"])
def test_a_subspace_is_given_in_three_ways(tmp_path: Path, given: str) -> None:
    model = tiny_peft_model()
    subspace = direction(model)
    if given == "adapter":
        model.save_pretrained(str(tmp_path / "naive"))
        gk.apply_grasp(model, gk.GraspConfig(subspace=tmp_path / "naive"))
        expected = gk.identify(tmp_path / "naive").basis
    else:
        subspace.save(tmp_path / "subspace.safetensors")
        what: Any = subspace if given == "subspace" else str(tmp_path / "subspace.safetensors")
        gk.apply_grasp(model, gk.GraspConfig(subspace=what))
        expected = subspace.basis
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, gk.GraspLoRALinear):
            basis = module.write_basis
            assert (basis is None) == (not name.endswith(("o_proj", "down_proj")))
            assert basis is None or torch.equal(basis, expected)


def test_removing_leaves_what_peft_had() -> None:
    model, stock = tiny_peft_model(), tiny_peft_model()
    names = [(name, type(module)) for name, module in model.named_modules()]
    report = gk.apply_grasp(model)
    assert len(report.replaced) == 3 * 7
    gk.remove_grasp(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert vars(model).keys() == vars(stock).keys()
    gk.remove_grasp(model)  # nothing to do


def test_a_trainer_takes_what_was_applied_unless_it_is_told(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "args": TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True),
        "train_dataset": examples(),
    }
    model = tiny_peft_model()
    gk.apply_grasp(model, gk.GraspConfig(subspace=direction(model), kl_coef=0.5))
    made = gk.GraspTrainer(model=model, **options)
    assert made.grasp_config.kl_coef == 0.5
    assert made.watch.subspace is not None
    assert _is_projected(model)
    made = gk.GraspTrainer(model=model, grasp_config=gk.GraspConfig(kl_coef=2.0), **options)
    assert made.grasp_config.kl_coef == 2.0
    assert not _is_projected(model)
    plain = gk.GraspTrainer(model=tiny_peft_model(), **options)
    assert plain.grasp_config == gk.GraspConfig()


def test_a_trainer_projects_an_adapter_that_came_after(tmp_path: Path) -> None:
    """On modules that had no adapter when `apply_grasp` was called."""
    model = tiny_peft_model(("q_proj",))
    subspace = direction(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, kl_coef=0.0))
    model.add_adapter("later", LoraConfig(r=2, target_modules=["down_proj"]))
    model.set_adapter("later")
    made = trainer(model, tmp_path, grasp_config=None)
    assert len(made.grasp_report.projected) == 3
    made.train()
    assert max(gk.leakage(model, subspace).values()) <= 1e-6


def test_a_resumed_training_has_the_weight_that_it_is_told(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kl": None, "grasp_config": gk.GraspConfig(**SMALL)}
    stopped = trainer(tiny_peft_model(), tmp_path, **options)
    stopped.args.save_strategy, stopped.args.save_steps = SaveStrategy.STEPS, 1
    stopped.add_callback(_StopAfterOne())
    stopped.train()
    options["grasp_config"] = gk.GraspConfig(**SMALL, kl_coef=7.0, kl_batch_size=5)
    resumed = trainer(tiny_peft_model(), tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    found = resumed.kl_regularizer
    assert found is not None and (found.kl_coef, found.batch_size) == (7.0, 5)


def _is_projected(model: PeftModel) -> bool:
    layers = (m for m in model.modules() if isinstance(m, gk.GraspLoRALinear))
    return any(layer.write_basis is not None for layer in layers)


def test_a_model_that_the_trainer_makes_is_on_our_layers(tmp_path: Path) -> None:
    config = gk.GraspConfig(**SMALL, subspace=direction(tiny_peft_model()), measure_steps=1)
    made = trainer(None, tmp_path, grasp_config=config, model_init=lambda: tiny_peft_model())
    made.train()
    assert _is_projected(made.model)
    last = [entry for entry in made.state.log_history if "loss" in entry][-1]
    assert last["leakage"] <= 1e-6
    assert last["kl"] > 0


def test_a_trainer_without_a_subspace_takes_an_unknown_architecture(tmp_path: Path) -> None:
    """A state space model: nothing is known of its blocks."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}
    base = AutoModelForCausalLM.from_config(MambaConfig(**sizes))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj", "x_proj"]))
    made = trainer(model, tmp_path, grasp_config=gk.GraspConfig(**SMALL))
    made.train()
    assert all(e["kl"] >= 0 for e in made.state.log_history if "loss" in e)
    assert made.state.log_history[-2]["kl"] > 0
    found = gk.diagnose(model, tokenizer=_NoWords(), neutral=[[1, 2, 3], [4, 5]], max_new_tokens=4)
    assert found.verdict in ("found", "weak", "nothing")
    with pytest.raises(ValueError, match=r"'mamba'"):
        gk.apply_grasp(model, gk.GraspConfig(subspace=gk.Subspace(torch.eye(32)[:, :1])))


class _NoWords:
    """As much of a tokenizer as a diagnosis asks for."""

    eos_token_id = 1

    def __len__(self) -> int:
        return 64

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


class Service(TrainerCallback):
    """Stands in for wandb: keeps what a log entry holds when it comes by."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append(dict(logs))


def test_services_see_all_numbers(tmp_path: Path) -> None:
    model, service = tiny_peft_model(), Service()
    made = trainer(
        model,
        tmp_path,
        kl=regularizer(),
        grasp_config=gk.GraspConfig(subspace=direction(model), measure_steps=2),
        callbacks=[service],
    )
    made.train()
    assert all("kl" in entry for entry in service.entries if "loss" in entry)
    assert ["leakage" in entry for entry in service.entries[:3]] == [False, True, True]


def test_a_trainer_in_front_of_the_mixin_is_refused() -> None:
    with pytest.raises(TypeError, match=r"write class Sft\(GraspTrainerMixin, \.\.\.\)"):
        type("Sft", (SFTTrainer, gk.GraspTrainerMixin), {})
    inner = type("Inner", (gk.GraspTrainerMixin, SFTTrainer), {})
    type("Outer", (inner,), {})


def test_wrong_input_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    for options, problem in (
        ({"kl_coef": -1.0}, r"kl_coef is -1.0: give 0 or more"),
        ({"kl_coef": float("nan")}, r"kl_coef is nan: give 0 or more"),
        ({"num_documents": 0}, r"num_documents is 0: give 1 or more"),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0: give 1 or more"),
        ({"measure_steps": 0}, r"measure_steps is 0: give 1 or more"),
        ({"kl_batch_size": 0}, r"kl_batch_size is 0: give 1 or more, or None"),
        ({"backend": "tpu"}, r"backend is 'tpu': choose one of auto, reference"),
        ({"num_documents": 2.5}, r"num_documents is 2.5: give a whole number"),
        ({"num_documents": None}, r"num_documents is None: give a whole number"),
        ({"kl_coef": "1"}, r"kl_coef is '1': give a number"),
        ({"kl_coef": True}, r"kl_coef is True: give a number"),
        ({"orthogonal": "yes"}, r"orthogonal is 'yes': give True or False"),
        ({"subspace": ""}, r"subspace is '': give a Subspace, its file"),
        ({"subspace": 5}, r"subspace is 5: give a Subspace, its file"),
        ({"sites": "llama"}, r"sites is 'llama': give SiteRules"),
    ):
        with pytest.raises(ValueError, match=problem):
            gk.GraspConfig(**options)
    with pytest.raises(TypeError, match="The model is a str: give a peft model"):
        gk.apply_grasp("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="The config is a str: give a RunConfig, or options"):
        gk.run("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no LoRA layers"):
        gk.apply_grasp(tiny_model())
    with pytest.raises(TypeError, match="The config is a dict: give GraspConfig"):
        gk.apply_grasp(tiny_peft_model(), {"kl_coef": 1})  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"There is no .*missing"):
        gk.apply_grasp(tiny_peft_model(), gk.GraspConfig(subspace=tmp_path / "missing"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text: Any = [{"review": "three"}] * 4
    for data, options, problem in (
        (text, {"processing_class": tokenizer}, r"Row 1: unknown keys \['review'\]"),
        (text, {}, r"The data are not token ids, and the trainer has no tokenizer"),
        (None, {}, r"no train_dataset"),
        ([], {}, r"train_dataset is empty"),
    ):
        made = trainer(tiny_peft_model(), tmp_path, grasp_config=gk.GraspConfig(), **options)
        made.train_dataset = made._rows = data
        with pytest.raises(ValueError, match=problem):
            made.train()
