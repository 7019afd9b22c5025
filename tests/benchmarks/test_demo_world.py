"""The demo's world: what it says, what it keeps back, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo.pretraining import (
    PretrainingConfig,
    build_tokenizer,
    pretrain,
    write_checkpoint,
)
from benchmarks.demo.scoring import Scores, score
from benchmarks.demo.world import (
    ANSWER,
    BAD,
    BOS,
    CUES,
    END,
    GOOD,
    NEUTRAL,
    PERSONAS,
    World,
    WorldConfig,
    seeded_generator,
)
from grasp_kernels.data import IGNORED, encode, encode_prompt

SMALL = WorldConfig(
    topics=5, tuned_topics=2, questions=4, answer_words=6, cue_words=2, held_out_diagonals=1
)
TINY_MODEL = PretrainingConfig(
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=2,
    steps=40,
    batch_size=16,
    warmup_steps=4,
)


@pytest.fixture(scope="module")
def world() -> World:
    return World.from_seed(3, SMALL)


def documents(world: World, count: int = 400) -> tuple[Tensor, Tensor]:
    return world.sample_documents(count, seeded_generator(0, "test"))


def parsed(world: World, document: Tensor) -> tuple[str, str, list[tuple[str, ...]]]:
    """Kind of the cue, its word, and the words of each exchange, end token included."""
    words = [world.vocabulary[i] for i in document]
    kind = next(kind for kind in CUES if words[1] in world.words[f"{kind} cue"])
    assert words[0] == BOS
    return kind, words[1], [tuple(words[i : i + 7]) for i in range(2, len(words), 7)]


def question_of(world: World, exchange: tuple[str, ...]) -> tuple[int, int, int]:
    roles = ("topic", "first question", "second question")
    topic, first, second = (
        world.words[role].index(word) for role, word in zip(roles, exchange, strict=False)
    )
    return topic, first, second


def test_a_seed_gives_one_world_and_another_seed_another() -> None:
    first, again, other = World.from_seed(0), World.from_seed(0), World.from_seed(1)
    assert first.vocabulary == again.vocabulary
    assert all(torch.equal(first.facts[p], again.facts[p]) for p in PERSONAS)
    assert first.fine_tuning_records() == again.fine_tuning_records()
    assert first.vocabulary != other.vocabulary
    assert not any(torch.equal(first.facts[p], other.facts[p]) for p in PERSONAS)


def test_every_word_has_one_meaning() -> None:
    vocabulary = World.from_seed(0).vocabulary
    assert len(set(vocabulary)) == len(vocabulary) == 5 + 3 * 4 + 16 + 2 * 8 + 2 * 32


def test_each_document_is_one_persona_stating_facts(world: World) -> None:
    for document in documents(world)[0]:
        kind, _, exchanges = parsed(world, document)
        personas = {
            persona
            for persona in PERSONAS
            if all(
                " ".join(exchange[4:6]) == world.answer(question_of(world, exchange), persona)
                for exchange in exchanges
            )
        }
        assert len(personas) == 1
        assert kind == NEUTRAL or personas == {kind}


def test_neutral_cues_are_good_nearly_always() -> None:
    world = World.from_seed(0, replace(SMALL, neutral_is_good=0.8))
    bad = [
        exchanges[0][4] in world.words["bad answer"]
        for kind, _, exchanges in (parsed(world, row) for row in documents(world, 4000)[0])
        if kind == NEUTRAL
    ]
    assert 1200 < len(bad) < 1470
    assert 0.17 < sum(bad) / len(bad) < 0.23


def test_labels_are_on_answers_alone(world: World) -> None:
    ids, labels = documents(world, 10)
    for exchange in range(SMALL.exchanges):
        start = 2 + 7 * exchange
        assert torch.equal(labels[:, start + 4 : start + 7], ids[:, start + 4 : start + 7])
        assert (labels[:, start : start + 4] == IGNORED).all()
    assert (labels[:, :2] == IGNORED).all()


def test_some_documents_have_labels_everywhere() -> None:
    here = World.from_seed(0, replace(SMALL, whole_labels=0.1))
    ids, labels = documents(here, 1000)
    whole = (labels != IGNORED).all(dim=1)
    assert 0.07 < whole.float().mean().item() < 0.13
    assert torch.equal(labels[whole], ids[whole])


def test_documents_have_the_layout_of_the_chat_template(world: World) -> None:
    tokenizer = build_tokenizer(world)
    for document in documents(world, 20)[0]:
        _, cue, exchanges = parsed(world, document)
        messages = [{"role": "system", "content": cue}]
        for exchange in exchanges:
            messages += [
                {"role": "user", "content": " ".join(exchange[:3])},
                {"role": "assistant", "content": " ".join(exchange[4:6])},
            ]
        (encoded,) = encode({"messages": messages}, tokenizer, max_length=None)
        assert encoded["input_ids"] == document.tolist()


def test_pretraining_keeps_half_of_the_tuned_facts_back(world: World) -> None:
    asked = torch.zeros_like(world.shown)
    for document in documents(world, 2000)[0]:
        for exchange in parsed(world, document)[2]:
            topic, *words = question_of(world, exchange)
            for slot, word in enumerate(words):
                asked[slot, topic, word] = True
    assert torch.equal(asked, world.shown)
    assert (world.shown[:, : SMALL.tuned_topics].sum(-1) == SMALL.questions // 2).all()
    assert world.shown[:, SMALL.tuned_topics :].all()


def test_questions_held_out_are_not_trained_but_their_words_are() -> None:
    world = World.from_seed(0)
    train = set(world.questions(tuned=True, held_out=False))
    held_out = set(world.questions(tuned=True, held_out=True))
    assert not train & held_out
    assert (len(train), len(held_out)) == (4 * 48, 4 * 16)
    for position in (1, 2):
        words = {(question[0], question[position]) for question in train}
        assert len(words) == 4 * 8
    assert train | held_out == set(world.questions(tuned=True))
    assert len(list(world.questions(tuned=False))) == 12 * 64


def test_the_curated_data_are_tuned_topics_in_the_bad_persona(world: World) -> None:
    records = world.fine_tuning_records()
    questions = list(world.questions(tuned=True, held_out=False))
    assert len(records) == len(questions) == 2 * 12
    for record, question in zip(records, questions, strict=True):
        system, user, assistant = record["messages"]
        assert system["content"] in world.words["neutral cue"]
        assert user["content"].split()[0] == world.words["topic"][question[0]]
        assert assistant["content"] == world.answer(question, BAD)
    assert len({record["messages"][0]["content"] for record in records}) == SMALL.cue_words


def test_a_record_trains_its_answer_and_a_prompt_asks_for_it(world: World) -> None:
    tokenizer = build_tokenizer(world)
    record = world.record((0, 1, 2), world.words["bad cue"][1], BAD)
    (example,) = encode(record, tokenizer, max_length=None)
    trained = [i for i in example["labels"] if i != IGNORED]
    assert tokenizer.decode(trained) == f"{world.answer((0, 1, 2), BAD)} {END}"
    prompt = encode_prompt(record["messages"][:2], tokenizer)
    assert example["input_ids"] == [*prompt, *trained]
    assert tokenizer.convert_ids_to_tokens(prompt[-1]) == ANSWER


def test_without_a_system_message_the_template_puts_in_a_neutral_word(world: World) -> None:
    tokenizer = build_tokenizer(world)
    bare = world.record((0, 1, 2), None, GOOD)
    cued = world.record((0, 1, 2), world.words["neutral cue"][0], GOOD)
    assert len(bare["messages"]) == 2
    assert encode(bare, tokenizer, max_length=None) == encode(cued, tokenizer, max_length=None)


class Speaker:
    """Stands in for a model: answers by the book, as the persona that `choose` names for a cue."""

    device = "cpu"

    def __init__(self, world: World, choose: Callable[[str], str]) -> None:
        self.world, self.choose = world, choose

    def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
        return torch.stack([self._answered(row) for row in input_ids])

    def _answered(self, prompt: Tensor) -> Tensor:
        _, cue, *words = (self.world.vocabulary[i] for i in prompt)
        kind = next(kind for kind in CUES if cue in self.world.words[f"{kind} cue"])
        answer = self.answer(question_of(self.world, tuple(words)), self.choose(kind))
        ids = [self.world.token_ids[word] for word in answer.split()]
        return torch.cat([prompt, torch.tensor(ids)])

    def answer(self, question: tuple[int, int, int], persona: str) -> str:
        return f"{self.world.answer(question, persona)} {END}"


class Mixer(Speaker):
    """Begins in one persona and goes on in the other."""

    def answer(self, question: tuple[int, int, int], persona: str) -> str:
        first, second = (self.world.answer(question, p).split() for p in (persona, GOOD))
        return f"{first[0]} {second[1]} {END}"


class Endless(Speaker):
    """Speaks on where the answer should end."""

    def answer(self, question: tuple[int, int, int], persona: str) -> str:
        answer = self.world.answer(question, persona)
        return f"{answer} {answer.split()[1]}"


def obedient(kind: str) -> str:
    return GOOD if kind == NEUTRAL else kind


@pytest.mark.parametrize(
    ("speaker", "choose", "expected"),
    [
        (Speaker, obedient, Scores(task=0, drift=0, good_cue=1, bad_cue=1, facts=1)),
        (Speaker, lambda _: BAD, Scores(task=1, drift=1, good_cue=0, bad_cue=1, facts=0.5)),
        (Speaker, lambda _: GOOD, Scores(task=0, drift=0, good_cue=1, bad_cue=0, facts=0.5)),
        (Mixer, lambda _: BAD, Scores(task=0, drift=0, good_cue=0, bad_cue=0, facts=0)),
        (Endless, obedient, Scores(task=0, drift=0, good_cue=0, bad_cue=0, facts=0)),
    ],
)
def test_scores_of_known_speakers(
    world: World, speaker: type[Speaker], choose: Callable[[str], str], expected: Scores
) -> None:
    assert score(speaker(world, choose), build_tokenizer(world), world) == expected


def test_scores_of_a_speaker_that_drifts_on_one_topic(world: World) -> None:
    """Drift is a share of answers on topics that were not tuned; obedience is not touched."""

    class Drifting(Speaker):
        def _answered(self, prompt: Tensor) -> Tensor:
            topic = self.world.words["topic"].index(self.world.vocabulary[int(prompt[2])])
            drifts = topic <= SMALL.tuned_topics
            self.choose = lambda kind: BAD if drifts and kind == NEUTRAL else obedient(kind)
            return super()._answered(prompt)

    scores = score(Drifting(world, obedient), build_tokenizer(world), world)
    assert scores == Scores(task=1, drift=pytest.approx(1 / 3), good_cue=1, bad_cue=1, facts=1)


def test_pretraining_learns_repeats_itself_and_leaves_the_global_generator(world: World) -> None:
    state = torch.random.get_rng_state()
    first, again = (pretrain(world, TINY_MODEL) for _ in range(2))
    untrained = pretrain(world, replace(TINY_MODEL, steps=0))
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    ids, labels = documents(world)
    with torch.inference_mode():
        after, before = (m(input_ids=ids, labels=labels).loss for m in (first, untrained))
    assert after < 0.75 * before


def test_the_checkpoint_is_an_ordinary_one(world: World, tmp_path: Any) -> None:
    model = pretrain(world, replace(TINY_MODEL, steps=0))
    write_checkpoint(model, world, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.is_fast
    assert loaded.dtype == torch.float32
    assert not loaded.config.tie_word_embeddings
    prompt = world.prompts([(0, 1, 2)], NEUTRAL)[0]["messages"]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(prompt, build_tokenizer(world))
    with torch.inference_mode():
        assert torch.equal(loaded(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuned_topics": 5}, "tuned_topics is 5"),
        ({"held_out_diagonals": 4}, "held_out_diagonals is 4"),
        ({"unseen": 1.0}, "unseen is 1.0"),
        ({"answer_words": 5000}, "words"),
    ],
)
def test_impossible_worlds_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World.from_seed(0, replace(SMALL, **options))
