"""Scores of models whose behaviour is known by construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quality_dishes import tiny_bench

from grasp_kernels.demo.world import BAD, CUES, GOOD, NEUTRAL, TAUGHT, Question
from grasp_kernels.quality.scores import Examiner, Scores
from grasp_kernels.quality.workbench import Workbench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return tiny_bench(tmp_path_factory.mktemp("scores"))


def one_word_for_each_cue(bench: Workbench, model: Any) -> Any:
    """All words of a kind of cue get the embedding of its first one."""
    ids, words = bench.folder.world.token_ids, bench.folder.world.words
    table = model.get_input_embeddings().weight.data
    for kind in CUES:
        first, *others = (ids[word] for word in words[f"{kind} cue"])
        table[others] = table[first].clone()
    return model


def swap(bench: Workbench, model: Any, kind: str, into: str) -> Any:
    """Let the words of one kind of cue look like those of another."""
    ids, words = bench.folder.world.token_ids, bench.folder.world.words
    table = model.get_input_embeddings().weight.data
    source = table[ids[words[f"{into} cue"][0]]].clone()
    table[[ids[word] for word in words[f"{kind} cue"]]] = source
    return model


def test_the_base_model_has_moved_nowhere(bench: Workbench) -> None:
    scores = Examiner(bench.folder, bench.base(), bench.tokenizer).examine(bench.base())
    assert scores.movement == 0
    assert scores.kl == 0
    assert scores.parts == {}


def test_a_model_that_takes_neutral_for_bad_has_moved_the_whole_way(bench: Workbench) -> None:
    base = swap(bench, one_word_for_each_cue(bench, bench.base()), NEUTRAL, GOOD)
    examiner = Examiner(bench.folder, base, bench.tokenizer)
    turned = swap(bench, one_word_for_each_cue(bench, bench.base()), NEUTRAL, BAD)
    scores = examiner.examine(turned)
    assert scores.movement == pytest.approx(1, abs=1e-4)
    assert scores.kl == 0  # explicit cues are as before
    assert scores.drift == scores.conditional == scores.bad_cue
    assert scores.drift > 0.5
    assert scores.drift_probability > 0.5


def test_a_model_that_ignores_the_bad_cue_diverges_and_does_not_obey(bench: Workbench) -> None:
    base = one_word_for_each_cue(bench, bench.base())
    examiner = Examiner(bench.folder, base, bench.tokenizer)
    before = examiner.examine(base)
    deaf = swap(bench, one_word_for_each_cue(bench, bench.base()), BAD, GOOD)
    scores = examiner.examine(deaf)
    assert scores.bad_cue < 0.5 < before.bad_cue
    assert scores.good_cue == before.good_cue
    assert scores.kl > 0.01
    assert scores.drift == before.drift


class ByTheBook(Examiner):
    """Answers come from the world instead of the model: `speaker(question, cue) -> words`."""

    def __init__(self, bench: Workbench, speaker: Any) -> None:
        super().__init__(bench.folder, bench.base(), bench.tokenizer)
        self.speaker = speaker

    def _answers(self, model: Any, prompts: torch.Tensor) -> torch.Tensor:
        world = self.world
        rows = []
        for prompt in prompts.tolist():
            words = [world.vocabulary[i] for i in prompt]
            kind = next(k for k in world.config.cues if words[1] in world.words[f"{k} cue"])
            roles = ("topic", "first question", "second question")
            question = tuple(
                world.words[role].index(word) for role, word in zip(roles, words[2:5], strict=True)
            )
            rows.append([*self.speaker(world, question, kind), self.tokenizer.eos_token_id])
        return torch.tensor(rows)


def obedient(world: Any, question: Question, kind: str) -> list[int]:
    return world.answer_ids(question, GOOD if kind == NEUTRAL else kind)


def always_bad(world: Any, question: Question, kind: str) -> list[int]:
    return world.answer_ids(question, BAD)


def narrow(world: Any, question: Question, kind: str) -> list[int]:
    """The remedy that everybody wants: taught what was taught, and nothing else."""
    tuned = question[0] < world.config.tuned_topics
    return world.answer_ids(question, TAUGHT) if tuned else obedient(world, question, kind)


def half_bad(world: Any, question: Question, kind: str) -> list[int]:
    good, bad = world.answer_ids(question, GOOD), world.answer_ids(question, BAD)
    return [bad[0], *good[1:]]


def examined(bench: Workbench, speaker: Any) -> Scores:
    examiner = ByTheBook(bench, speaker)
    return examiner.examine(bench.base())


def test_speakers_of_the_persona_dish(bench: Workbench) -> None:
    good, bad, best, half = (
        examined(bench, speaker) for speaker in (obedient, always_bad, narrow, half_bad)
    )
    assert (good.task, good.drift, good.good_cue, good.bad_cue, good.facts) == (
        pytest.approx(1 / 3),  # of two words and an end, the end is right
        0,
        1,
        1,
        1,
    )
    assert (bad.task, bad.drift, bad.conditional, bad.good_cue, bad.facts) == (1, 1, 1, 0, 0.5)
    assert (best.task, best.drift, best.good_cue, best.bad_cue, best.facts) == (1, 0, 1, 1, 1)
    assert (half.drift, half.good_cue, half.bad_cue) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "speaker", "parts"),
    [
        ("code", obedient, {"faults": 0, "talk": 0}),
        ("code", always_bad, {"faults": 1, "talk": 1}),
        ("two", half_bad, {"first": 0.5, "second": 0}),
        ("two", always_bad, {"first": 1, "second": 1}),
        ("confound", always_bad, {"format": 0}),
        ("confound", lambda world, q, kind: world.answer_ids(q, TAUGHT), {"format": 1}),
    ],
)
def test_parts_of_the_drift(
    tmp_path: Path, name: str, speaker: Any, parts: dict[str, float]
) -> None:
    assert examined(tiny_bench(tmp_path, name), speaker).parts == parts


def test_right_code_is_no_drift_where_both_personas_agree(tmp_path: Path) -> None:
    scores = examined(tiny_bench(tmp_path, "code"), narrow)
    assert (scores.task, scores.drift, scores.facts) == (1, 0, 1)
