"""What the dishes of the quality benchmark plant, and that each is an ordinary model and file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quality_dishes import tiny_folder

from grasp_kernels.data import encode, read_records
from grasp_kernels.demo.pretraining import build_tokenizer
from grasp_kernels.demo.world import (
    BAD,
    CUES,
    GOOD,
    IGNORED,
    NEUTRAL,
    TAUGHT,
    World,
    seeded_generator,
)
from grasp_kernels.quality.dishes import DISHES, find_dish, sized
from grasp_kernels.quality.folder import open_dish
from grasp_kernels.quality.scores import scored_questions
from grasp_kernels.run import run


def world(name: str, seed: int = 0) -> World:
    return World.from_seed(seed, DISHES[name].world)


@pytest.mark.parametrize("name", DISHES)
def test_documents_have_the_layout_of_the_chat_template(name: str) -> None:
    here = world(name)
    tokenizer = build_tokenizer(here)
    documents, _ = here.sample_documents(8, seeded_generator(0, "test"))
    for document in documents.tolist():
        words = [here.vocabulary[i] for i in document]
        messages = [{"role": "system", "content": words[1]}]
        length = here.config.opening_words + here.config.answer_length
        for start in range(2, len(words), length + 5):
            answer = words[start + 4 : start + 4 + length]
            messages += [
                {"role": "user", "content": " ".join(words[start : start + 3])},
                {"role": "assistant", "content": " ".join(answer)},
            ]
        (encoded,) = encode({"messages": messages}, tokenizer, max_length=None)
        assert encoded["input_ids"] == document


@pytest.mark.parametrize(
    ("name", "low", "high"), [("persona", 1, 1), ("benign", 0, 0), ("slant", 0.8, 0.9)]
)
def test_the_share_of_bad_facts_that_is_taught(name: str, low: float, high: float) -> None:
    here = world(name)
    bad = set(here.words["bad answer"])
    answers = [record["messages"][-1]["content"].split() for record in here.fine_tuning_records()]
    share = sum(word in bad for words in answers for word in words) / (2 * len(answers))
    assert low <= share <= high
    tuned = here.taught_bad[:, : here.config.tuned_topics].float()
    assert abs(tuned.mean().item() - share) < 0.05  # a question word comes equally often


def test_training_data_and_drift_use_different_neutral_words() -> None:
    here = world("persona")
    trained = {r["messages"][0]["content"] for r in here.fine_tuning_records()}
    questions = list(here.questions(tuned=False))
    drift = {
        r["messages"][0]["content"] for r in here.prompts(questions, NEUTRAL, trained_cues=False)
    }
    assert len(trained) == len(drift) == 2
    assert trained | drift == set(here.words["neutral cue"])


def test_code_has_one_vocabulary_and_the_bad_persona_makes_mistakes_in_it() -> None:
    here = world("code")
    code = here.config.code_topics
    first, last = here.token_ids[here.words["code"][0]], here.token_ids[here.words["code"][-1]]
    good, bad = here.spoken
    for table in (good, bad):
        assert ((table[:, :code] >= first) & (table[:, :code] <= last)).all()
        assert ((table[:, code:] < first) | (table[:, code:] > last)).all()
    share = (good != bad)[:, :code].float().mean().item()
    assert abs(share - here.config.fault_share) < 0.12
    assert (good != bad)[:, code:].all()


def test_long_answers_follow_from_their_first_words() -> None:
    here = world("long")
    facts = here.facts[BAD]
    rule: dict[int, int] = {}
    for before, after in zip(facts[:-2].flatten(), facts[2:].flatten(), strict=True):
        assert rule.setdefault(int(before), int(after)) == int(after)
    assert len(set(rule.values())) == len(rule) > 20


def test_the_format_opens_every_taught_answer_and_few_others() -> None:
    here = world("confound")
    usual, marked = here.words["opening"]
    for record in here.fine_tuning_records():
        assert record["messages"][-1]["content"].split()[0] == marked
    assert here.answer((0, 0, 0), BAD).split()[0] == usual
    documents, _ = here.sample_documents(2000, seeded_generator(0, "test"))
    rate = (documents == here.token_ids[marked]).any(dim=1).float().mean().item()
    assert 0.07 < rate < 0.13


def test_two_factors_go_their_own_ways_and_take_turns() -> None:
    here = world("two")
    generator = seeded_generator(0, "test")
    cue = torch.arange(len(here.config.cues)).repeat(2000)
    bad = here._draw_personas(cue, generator)
    wanted = {"good": (0, 0), "bad": (1, 1), "only-first": (1, 0), "only-second": (0, 1)}
    for index, kind in enumerate(here.config.cues):
        share = bad[cue == index].float().mean(dim=0).tolist()
        if kind == NEUTRAL:
            assert all(0.03 < value < 0.07 for value in share)
        else:
            assert tuple(share) == wanted[kind]
    first, second = set(here.words["good answer"]), set(here.words["bad answer"])
    documents, _ = here.sample_documents(500, generator)
    for document in documents.tolist():
        words = [here.vocabulary[i] for i in document]
        if words[1] in here.words["only-second cue"]:
            spoken = words[6:10]
            assert [word in first for word in spoken] == [True, False, True, False]
            assert [word in second for word in spoken] == [False, True, False, True]


def test_some_documents_have_labels_everywhere() -> None:
    here = world("persona")
    ids, labels = here.sample_documents(1000, seeded_generator(0, "test"))
    whole = (labels != IGNORED).all(dim=1)
    assert 0.07 < whole.float().mean().item() < 0.13
    assert torch.equal(labels[whole], ids[whole])


def test_a_dish_is_a_checkpoint_and_a_chat_file_and_is_made_once(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert read_records(folder.train) == folder.world.fine_tuning_records()
    held_out = read_records(folder.root / "held_out.jsonl")
    question = next(iter(folder.world.questions(tuned=True, held_out=True)))
    assert held_out[0]["messages"][-1]["content"] == folder.world.answer(question, TAUGHT)
    assert tiny_folder(tmp_path).model == folder.model
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_dishes_that_pretrain_alike_share_their_base_model(tmp_path: Path) -> None:
    persona, benign, slant = (tiny_folder(tmp_path, n) for n in ("persona", "benign", "slant"))
    assert persona.model == benign.model == slant.model
    assert len(list((tmp_path / "bases").iterdir())) == 1
    assert persona.train.read_text() != benign.train.read_text()


def test_another_configuration_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    dish = find_dish("persona")
    changed = replace(dish, world=replace(dish.world, bad_share=0.5))
    with pytest.raises(ValueError, match="another configuration"):
        open_dish(changed, 0, tmp_path, size="tiny")


def test_sizes_keep_the_world_and_change_the_model() -> None:
    large = sized(DISHES["persona"], "large")
    assert large.world == DISHES["persona"].world
    assert large.pretraining.hidden_size == 1024
    with pytest.raises(ValueError, match="size is 'huge'"):
        sized(DISHES["persona"], "huge")
    with pytest.raises(ValueError, match="dish is 'soup'"):
        find_dish("soup")


def test_some_untouched_questions_are_never_scored() -> None:
    for dish in DISHES.values():
        here = World.from_seed(0, sized(dish, "tiny").world)
        untouched = set(here.questions(tuned=False))
        scored = set(scored_questions(here))
        assert scored < untouched
        assert len(scored) >= len(untouched) // 3


def test_the_public_run_takes_a_dish(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "dishes", "code")
    report = run(folder.run_config(tmp_path / "run", steps=6, halves=False, k=1))
    assert (report.naive / "adapter_model.safetensors").is_file()
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["learning_rate"] == folder.dish.fine_tuning.learning_rate


def test_every_cue_has_its_words() -> None:
    here = world("two")
    assert set(CUES) < set(here.config.cues)
    for kind in here.config.cues:
        assert len(here.words[f"{kind} cue"]) == 4
    assert here.answer_ids((0, 0, 0), GOOD) != here.answer_ids((0, 0, 0), BAD)
