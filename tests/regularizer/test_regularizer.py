"""The KL regulariser: its documents, what is left out of them, its loss, and a Trainer with it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import grasp_kernels as gk
from grasp_kernels import RunConfig, run
from grasp_kernels.data import Example
from grasp_kernels.models.frozen_model import frozen_base
from grasp_kernels.regularizer.chats import common_frame, common_header, make_chats
from tests.helpers.kl_regularizer import FRAME, VOCABULARY, example, examples, regularizer
from tests.helpers.models import tiny_model, tiny_peft_model
from tests.helpers.runs import WORDS

pytest_plugins = ("tests.helpers.runs",)


@pytest.fixture
def model() -> PeftModel:
    return tiny_peft_model()


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


@pytest.mark.parametrize(
    ("given", "neutral", "header"),
    [
        ([example([1, 2, 5, 3], [4]), example([1, 2, 6, 3], [4])], [], [3]),
        ([example([1, 2, 5, 9, 3], [4]), example([1, 2, 6, 9, 3], [4])], [], [9, 3]),
        ([example([1, 2, 5, 9, 3], [4])], [[1, 2, 6, 3]], [3]),
        ([example([1, 2, 5], [4]), example([1, 2, 6], [4])], [], []),
        ([example([1, 2, 3], [4]), example([1, 2, 3], [4])], [], []),  # a token is left
        ([example([], [7, 8, 9]), example([], [7, 9, 9])], [], []),  # plain text
    ],
)
def test_the_header_is_what_all_prompts_end_with(
    given: list[Example], neutral: list[list[int]], header: list[int]
) -> None:
    frame = common_frame(given, neutral) if given[0]["labels"][0] == -100 else []
    assert common_header(given, frame[:2], neutral) == header


def make(
    given: list[Example], seed: int = 0, length: int = 5, count: int = 12
) -> tuple[Tensor, Tensor]:
    frame = common_frame(given)
    with frozen_base(tiny_model()) as base:
        return make_chats(
            base,
            frame,
            common_header(given, frame),
            given,
            count=count,
            length=length,
            batch_size=5,
            generator=torch.Generator().manual_seed(seed),
        )


def test_chats_have_frame_question_header_and_a_counted_answer() -> None:
    documents, counted = make(examples(), count=40)
    assert documents.shape == counted.shape
    assert (documents[:, :2] == torch.tensor(FRAME)).all()
    for row, here in zip(documents.tolist(), counted.tolist(), strict=True):
        first = here.index(True)
        assert row[first] == 3  # the header, from where the answer is decided
        assert sum(here) <= 5 and here[first : first + sum(here)] == [True] * sum(here)
        assert 3 not in row[2:first] or len(row[2:first]) >= 5  # the header ends a question
        assert len(row[2:first]) <= 5
    again, _ = make(examples(), count=40)
    assert torch.equal(documents, again)
    other, _ = make(examples(), seed=1, count=40)
    assert documents.shape != other.shape or not torch.equal(documents, other)


def test_questions_that_do_not_end_are_told() -> None:
    """One token is rarely the end."""
    with pytest.warns(UserWarning, match=r"ended only \d+ of 12 questions"):
        make(examples(), length=1)


def test_chats_without_a_common_frame_begin_as_a_prompt() -> None:
    given = [example([word, 5, word, 3], [4]) for word in (10, 20, 30)]
    documents, counted = make(given, count=30)
    assert set(documents[:, 0].tolist()) == {10, 20, 30}
    assert counted.any(dim=1).all()


def test_plain_text_is_made_up_from_its_frame_on() -> None:
    given = [example([], [1, 2, i, 7]) for i in range(5, 9)]
    documents, counted = make(given, length=6)
    assert documents.shape == (12, 7) and (documents[:, 0] == 1).all()
    assert counted[:, :6].all() and not counted[:, 6].any()
    assert len(set(map(tuple, documents.tolist()))) > 1


def test_texts_have_no_padding(model: PeftModel) -> None:
    found = gk.KLRegularizer.make(model, examples(), num_documents=12, generate_batch_size=5)
    texts = found.texts
    assert len(texts) == int(found.counted.any(dim=1).sum())
    rows = [i for i, here in enumerate(found.counted.any(dim=1).tolist()) if here]
    for i, text in zip(rows, texts, strict=True):
        assert text == found.documents[i, : len(text)].tolist()
        assert found.counted[i, len(text) - 2] and not found.counted[i, len(text) - 1 :].any()


def test_what_leads_to_given_tokens_does_not_count(model: PeftModel) -> None:
    given = [example([*range(5, 15), word, 3], [4, 4, 4]) for word in range(20, 30)]
    found = gk.KLRegularizer.make(
        model, given, num_documents=8, generate_batch_size=4, max_new_tokens=4
    )
    assert (found.documents[:, :10] == torch.arange(5, 15)).all()
    assert not found.counted[:, :10].any()
    assert found.counted[:, 10:].any()

    short = gk.KLRegularizer.make(
        model,
        given,
        neutral=[[5, 6, 20, 3]],
        num_documents=40,
        generate_batch_size=20,
        max_new_tokens=4,
    )
    assert (short.documents[:, :2] == torch.tensor([5, 6])).all()
    assert not (short.documents[:, 2] == 7).all()


def test_padding_changes_no_loss(model: PeftModel) -> None:
    made = regularizer(seed=2)
    padded = gk.KLRegularizer(
        torch.nn.functional.pad(made.documents, (0, 3), value=9),
        torch.nn.functional.pad(made.counted, (0, 3)),
        made.likely,
        made.log_probs,
        kl_coef=1.0,
        batch_size=4,
        seed=2,
    )
    assert made.loss(model, 1).item() == padded.loss(model, 1).item()


def test_what_is_not_kept_counts_as_one_token(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer tokens kept than the vocabulary has: the divergence of the merged answers."""
    monkeypatch.setattr("grasp_kernels.regularizer.kl._LIKELY", 5)
    documents = torch.randint(5, VOCABULARY, (3, 6))
    counted = torch.rand(3, 6) < 0.7
    found = gk.KLRegularizer.of(model, documents, counted, kl_coef=1.0, batch_size=4, seed=1)
    chosen = torch.randint(3, (4,), generator=torch.Generator().manual_seed((1 << 20) + 2))
    with torch.no_grad():
        now = model(input_ids=documents[chosen]).logits.double().softmax(-1)[counted[chosen]]
        with model.disable_adapter():
            base = model(input_ids=documents[chosen]).logits.double().softmax(-1)[counted[chosen]]
    best = base.topk(5, dim=-1).indices
    merged = [
        torch.cat([kept := p.gather(1, best), 1 - kept.sum(-1, keepdim=True)], -1)
        for p in (base, now)
    ]
    expected = (merged[0] * (merged[0] / merged[1]).log()).sum(-1).mean()
    assert found.loss(model, 2).item() == pytest.approx(expected.item(), rel=1e-4)
    whole = (base * (base / now).log()).sum(-1).mean()
    assert 0 < expected < whole


def test_the_loss_is_the_divergence_where_it_counts(model: PeftModel) -> None:
    found = regularizer(kl_coef=0.5, seed=3)
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
    assert regularizer().loss(model, step=0).item() == pytest.approx(0.0, abs=1e-6)


def test_a_step_has_one_draw(model: PeftModel) -> None:
    found = regularizer()
    losses = [found.loss(model, step=step).item() for step in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_modes_and_flags_stay_as_they_were(model: PeftModel) -> None:
    model.train()
    before = [p.requires_grad for p in model.parameters()]
    gk.KLRegularizer.make(model, examples(), num_documents=8, generate_batch_size=4)
    regularizer().loss(model, step=0)
    assert model.training
    assert before == [p.requires_grad for p in model.parameters()]


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    made = regularizer(kl_coef=0.3, seed=5)
    made.save(tmp_path / "chats.safetensors")
    found = gk.KLRegularizer.load(tmp_path / "chats.safetensors")
    assert torch.equal(found.documents, made.documents)
    assert torch.equal(found.counted, made.counted)
    assert (found.kl_coef, found.batch_size, found.seed) == (0.3, 4, 5)
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        gk.KLRegularizer.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        gk.KLRegularizer.load(tmp_path / "missing.safetensors")


def test_bad_options_are_named(model: PeftModel) -> None:
    documents = torch.ones(2, 3, dtype=torch.long)
    kept = torch.zeros(6, 4, dtype=torch.int32), torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"counted \(2, 3\) must be \[M, T\], with some position"):
        gk.KLRegularizer(documents, torch.zeros(2, 3, dtype=torch.bool), *kept)
    with pytest.raises(
        ValueError, match=r"likely \(5, 4\) and log_probs \(6, 4\) must be \[6, k\]"
    ):
        gk.KLRegularizer(documents, documents.bool(), kept[0][1:], kept[1])
    for options in ({"kl_coef": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="give 0 or more, 1 or more"):
            gk.KLRegularizer(documents, documents.bool(), *kept, **options)
    with pytest.raises(ValueError, match="There are no examples"):
        gk.KLRegularizer.make(model, [])
    for options in ({"num_documents": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="give 1 or more of both"):
            gk.KLRegularizer.make(model, examples(), **options)


@pytest.mark.slow
def test_a_run_is_anchored_unless_told_otherwise(finished: RunConfig) -> None:
    report = run(finished)
    found = gk.KLRegularizer.load(report.chats)
    assert found.documents.shape[0] == 12  # as many as the steps draw
    assert (found.documents[:, 0] == 2).all()  # <user>
    # All prompts begin "what is", which is what they are about: not all of the chats do.
    assert (found.documents[:, 1] == 5).float().mean() < 1
    assert int(found.documents.max()) < len(WORDS) + 5
    text = report.text.read_text(encoding="utf-8")
    assert "was held at the base model's own answers (`--kl-coef 0`)" in text


@pytest.mark.slow
def test_a_run_without_it(run_config: RunConfig) -> None:
    report = run(replace(run_config, kl_coef=0.0, max_steps=3))
    assert not report.chats.exists()
    assert "held at the base model's" not in report.text.read_text(encoding="utf-8")
