"""The own-text anchor: its documents, what is left out of them, its loss, and a Trainer with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_run import WORDS
from models import tiny_model, tiny_peft_model
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import grasp_kernels as gk
from grasp_kernels.anchor.look_alikes import unlike_training
from grasp_kernels.anchor.own_text import common_frame, document_length, make_documents
from grasp_kernels.data import Example, collate
from grasp_kernels.identification.frozen_model import frozen_base, written_blocks
from grasp_kernels.run import RunConfig, run

pytest_plugins = ("fixtures_run",)
FRAME, VOCABULARY = [1, 2], 32


def example(prompt: list[int], answer: list[int]) -> Example:
    return Example(input_ids=prompt + answer, labels=[-100] * len(prompt) + answer)


def examples(count: int = 40) -> list[Example]:
    """Prompts with one frame, a word of their own, and an answer that is always the same."""
    drawn = torch.randint(5, VOCABULARY, (count,)).tolist()
    return [example([*FRAME, word, 3], [4, 4, 4]) for word in drawn]


@pytest.fixture
def model() -> PeftModel:
    return tiny_peft_model()


def anchor(**options: Any) -> gk.OwnTextAnchor:
    documents = torch.randint(5, VOCABULARY, (6, 8))
    return gk.OwnTextAnchor(documents, torch.rand(6, 8) < 0.7, **{"batch_size": 4, **options})


@pytest.mark.parametrize(
    ("given", "frame"),
    [
        ([example([1, 2, 5, 3], [4]), example([1, 2, 6, 3], [4])], [1, 2]),
        ([example([1, 2], [4]), example([1, 2], [5])], [1]),  # never a whole prompt
        ([example([1, 2], [4]), example([2, 2], [5])], []),
        ([example([], [7, 8, 9]), example([], [7, 9, 9])], []),  # plain text
    ],
)
def test_the_frame_is_what_all_prompts_begin_with(given: list[Example], frame: list[int]) -> None:
    assert common_frame(given) == frame


@pytest.mark.parametrize(
    ("neutral", "frame"),
    [
        ([[1, 2, 8, 3]], [1, 2]),
        ([[1, 2, 5, 8, 3], [1, 2, 5, 9, 3]], [1, 2, 5]),
        ([[1, 2, 5, 8, 3], [1, 2, 9, 3]], [1, 2]),
        ([[1, 2]], [1]),
        ([[2]], []),
    ],
)
def test_the_frame_ends_where_prompts_about_other_things_go_another_way(
    neutral: list[list[int]], frame: list[int]
) -> None:
    """All training prompts share the instruction 5, 6, which is their task and no frame."""
    given = [example([1, 2, 5, 6, word, 3], [4]) for word in (7, 8, 9)]
    assert common_frame(given) == [1, 2, 5, 6]
    assert common_frame(given, neutral) == frame


def make(length: int, given: list[Example], seed: int = 0) -> torch.Tensor:
    with frozen_base(tiny_model()) as base:
        return make_documents(
            base,
            common_frame(given),
            given,
            count=12,
            length=length,
            batch_size=5,
            generator=torch.Generator().manual_seed(seed),
        )


def test_documents_begin_with_the_frame_and_follow_from_the_seed() -> None:
    documents = make(9, examples())
    assert documents.shape == (12, 9)
    assert (documents[:, :2] == torch.tensor(FRAME)).all()
    assert len(set(map(tuple, documents.tolist()))) > 1
    assert torch.equal(documents, make(9, examples()))
    assert not torch.equal(documents, make(9, examples(), seed=1))


@pytest.mark.parametrize(
    ("frame", "made_up", "length"), [(2, 128, 7), (2, 3, 5), (2, 1, 3), (6, 128, 7), (0, 3, 4)]
)
def test_documents_are_as_long_as_examples_at_most(frame: int, made_up: int, length: int) -> None:
    assert document_length(examples(), [1] * frame, made_up) == length


def test_what_leads_to_given_tokens_does_not_count(model: PeftModel) -> None:
    given = [example([*range(5, 15), word, 3], [4, 4, 4]) for word in range(20, 30)]
    found = gk.OwnTextAnchor.make(model, given, documents=8, generate_batch_size=4, max_length=4)
    assert found.documents.shape == (8, 14)
    assert (found.documents[:, :10] == torch.arange(5, 15)).all()
    assert not found.counted[:, :9].any()
    assert found.counted[:, 9:].any()

    short = gk.OwnTextAnchor.make(
        model, given, neutral=[[5, 6, 20]], documents=8, generate_batch_size=4, max_length=4
    )
    assert short.documents.shape == (8, 6)
    assert (short.documents[:, :2] == torch.tensor([5, 6])).all()


def test_without_a_frame_documents_begin_as_prompts_do() -> None:
    given = [example([i, 3], [4]) for i in (5, 6, 7)]
    assert set(make(6, given)[:, 0].tolist()) <= {5, 6, 7}


def test_what_looks_like_the_training_data_is_left_out() -> None:
    """Documents are half prompts with other answers, half random: of the first, the positions where
    an answer is decided go, of the others little."""
    given = examples()
    alike = torch.tensor([[*e["input_ids"][:4], *e["input_ids"][4:]] for e in given])
    other = torch.randint(5, VOCABULARY, (200, 7))
    with frozen_base(tiny_model()) as base:
        kept = unlike_training(
            base,
            written_blocks(base),
            torch.cat([alike, other]),
            given,
            batch_size=16,
            generator=torch.Generator().manual_seed(0),
        )
    decided = torch.tensor([False] * 3 + [True] * 3 + [False])
    assert kept[: len(given), decided].float().mean() <= 0.1  # 0.05 by its threshold
    assert kept[: len(given), :2].all()
    assert kept[len(given) :].float().mean() >= 0.8


def test_the_loss_is_the_divergence_where_it_counts(model: PeftModel) -> None:
    found = anchor(strength=0.5, seed=3)
    loss = found.loss(model, step=7)
    draw = torch.Generator().manual_seed(3 * (1 << 20) + 7)
    chosen = torch.randint(6, (4,), generator=draw)
    ids, counted = found.documents[chosen], found.counted[chosen]
    with torch.no_grad():
        now = model(input_ids=ids).logits.double().log_softmax(-1)
        with model.disable_adapter():
            base = model(input_ids=ids).logits.double().log_softmax(-1)
    expected = 0.5 * (base.exp() * (base - now)).sum(-1)[counted].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() > 1e-4
    loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    )


def test_an_adapter_that_does_nothing_is_where_it_should_be(model: PeftModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert anchor().loss(model, step=0).item() == pytest.approx(0.0, abs=1e-6)


def test_a_step_has_one_draw(model: PeftModel) -> None:
    found = anchor()
    losses = [found.loss(model, step=step).item() for step in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_modes_and_flags_stay_as_they_were(model: PeftModel) -> None:
    model.train()
    before = [p.requires_grad for p in model.parameters()]
    gk.OwnTextAnchor.make(model, examples(), documents=8, generate_batch_size=4)
    anchor().loss(model, step=0)
    assert model.training
    assert before == [p.requires_grad for p in model.parameters()]


def trainer(model: PeftModel, folder: Path, accumulation: int = 1) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    torch.manual_seed(1)
    data: Any = examples()
    return Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=lambda rows: collate(rows, 0)
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_adds_it_and_logs_it(tmp_path: Path, accumulation: int) -> None:
    losses = {}
    for strength in (None, 0.0, 1.0):
        held = None if strength is None else anchor(strength=strength)
        made = trainer(tiny_peft_model(), tmp_path, accumulation)  # which draws the data anew
        if held is not None:
            held.attach(made)
        made.train()
        losses[strength] = [e for e in made.state.log_history if "loss" in e]
    plain, nothing, anchored = losses.values()
    assert not any("anchor" in entry for entry in plain)
    assert [e["anchor"] for e in nothing] == [0.0] * 3
    assert [e["loss"] for e in nothing] == [e["loss"] for e in plain]
    # before the first update everything else is the same
    first = anchored[0]
    assert first["anchor"] > 1e-4
    # logged losses have four digits
    assert first["loss"] - first["anchor"] == pytest.approx(plain[0]["loss"], abs=2e-4)


def test_a_step_of_fewer_batches_than_the_accumulation_weighs_it_as_any_other(
    tmp_path: Path,
) -> None:
    """All data are two batches, where eight are asked for."""
    found = []
    for strength in (None, 1.0):
        made = trainer(tiny_peft_model(), tmp_path, accumulation=8)
        made.train_dataset = examples()[:8]
        if strength is not None:
            anchor(strength=strength).attach(made)
        made.train()
        found.append(next(e for e in made.state.log_history if "loss" in e))
    plain, anchored = found
    assert anchored["anchor"] > 1e-4
    assert anchored["loss"] - anchored["anchor"] == pytest.approx(plain["loss"], abs=2e-4)


@pytest.mark.parametrize(
    ("told", "counted", "expected"),
    [(None, None, False), (None, 5, True), (True, None, True), (False, 5, False)],
)
def test_the_trainer_says_whether_losses_are_parts_of_a_step(
    tmp_path: Path, told: bool | None, counted: int | None, expected: bool
) -> None:
    made = trainer(tiny_peft_model(), tmp_path, accumulation=4)
    made.loss_is_scaled_for_ga = told
    held = anchor()
    held.attach(made)
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
    anchor(strength=100.0).attach(made)
    assert made.evaluate(data)["eval_loss"] == expected


def test_training_with_it_stays_nearer(tmp_path: Path) -> None:
    found = {}
    for strength in (0.0, 3.0):
        model = tiny_peft_model()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)  # as every adapter begins: at the base model
        torch.manual_seed(0)
        held = anchor(strength=strength)
        made = trainer(model, tmp_path)
        made.args.max_steps = 30
        held.attach(made)
        made.train()
        model.eval()
        torch.manual_seed(0)
        found[strength] = sum(anchor(strength=1.0).loss(model, step=i).item() for i in range(8))
    assert found[3.0] < 0.5 * found[0.0]


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    made = anchor(strength=0.3, seed=5)
    made.save(tmp_path / "anchor.safetensors")
    found = gk.OwnTextAnchor.load(tmp_path / "anchor.safetensors")
    assert torch.equal(found.documents, made.documents)
    assert torch.equal(found.counted, made.counted)
    assert (found.strength, found.batch_size, found.seed) == (0.3, 4, 5)
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no own-text anchor"):
        gk.OwnTextAnchor.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        gk.OwnTextAnchor.load(tmp_path / "missing.safetensors")


def test_bad_options_are_named(model: PeftModel) -> None:
    documents = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"counted \(2, 3\) must be \[M, T\], with some position"):
        gk.OwnTextAnchor(documents, torch.zeros(2, 3, dtype=torch.bool))
    for options in ({"strength": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="give 0 or more, 1 or more"):
            gk.OwnTextAnchor(documents, documents.bool(), **options)
    with pytest.raises(ValueError, match="There are no examples to keep apart"):
        gk.OwnTextAnchor.make(model, [])
    for options in ({"documents": 0}, {"max_length": 0}):
        with pytest.raises(ValueError, match="give 1 or more of both"):
            gk.OwnTextAnchor.make(model, examples(), **options)


def test_a_run_is_anchored_unless_told_otherwise(finished: RunConfig) -> None:
    report = run(finished)
    found = gk.OwnTextAnchor.load(report.own_text)
    assert found.documents.shape[0] == finished.own_documents
    # All prompts begin "what is", which is what they are about.
    assert (found.documents[:, 0] == 2).all() and not (found.documents[:, 1] == 5).all()
    assert int(found.documents.max()) < len(WORDS) + 5
    text = report.text.read_text(encoding="utf-8")
    assert "held at the base model on text that the base model made up" in text


def test_a_run_without_it(run_config: RunConfig) -> None:
    report = run(replace(run_config, anchor="none", reads="free", steps=3))
    assert not report.own_text.exists()
    assert "held at the base model" not in report.text.read_text(encoding="utf-8")
