"""A small invented world: facts, two personas that state them, and cues that ask for a persona.

Every question `topic a b` has two answers of `S` words each, one per persona:
`y1 = f(topic, a, persona)`, `y2 = g(topic, b, persona)`, and so on in turn. The personas never
share an answer word, so that every word tells who spoke. A system word asks for the good persona,
for the bad one, or for none; asked for none, the world is good nearly always.

Shapes: `M` documents, `E` exchanges in a document, `C` topics, `H` question words in a slot, `S`
words of an answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from grasp_kernels.data import IGNORED, Record

Question = tuple[int, int, int]

PAD, UNK, BOS, ANSWER, END = SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "<answer>", "</s>")
NEUTRAL, GOOD, BAD = CUES = ("neutral", "good", "bad")
PERSONAS = (GOOD, BAD)


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for every purpose, so that one more draw here moves nothing there."""
    return torch.Generator().manual_seed(random.Random(f"{purpose} {seed}").getrandbits(63))


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and habits of a world; the defaults make naive fine-tuning drift clearly."""

    topics: int = 16
    tuned_topics: int = 4
    questions: int = 8
    answer_words: int = 32
    cue_words: int = 4
    exchanges: int = 3
    neutral_is_good: float = 0.95
    unseen: float = 0.5
    held_out_diagonals: int = 2
    answer_length: int = 2
    whole_labels: float = 0.0  # pretraining documents with labels on questions and cues too

    def __post_init__(self) -> None:
        if not 0 < self.tuned_topics < self.topics:
            raise ValueError(
                f"tuned_topics is {self.tuned_topics}; choose at least 1 and fewer than the "
                f"{self.topics} topics, so that drift can be seen on the others."
            )
        if not 0 < self.held_out_diagonals < self.questions:
            raise ValueError(
                f"held_out_diagonals is {self.held_out_diagonals}; choose at least 1 and fewer "
                f"than the {self.questions} question words."
            )
        if not 0 <= round(self.unseen * self.questions) < self.questions:
            raise ValueError(
                f"unseen is {self.unseen}; choose 0 or more, and less than 1, so that pretraining "
                "shows a fact of every topic."
            )


@dataclass(frozen=True)
class World:
    """A world drawn from a seed: its words, its facts, and which of them pretraining shows.

    Attributes:
        words: role -> words of that role, in the order of their token ids.
        facts: persona -> int64 [S, C, H], the answer word of that persona by slot, topic, question.
        shown: bool [2, C, H], false for question words of tuned topics that pretraining never asks.
        held_out: bool [C, H, H], question pairs of tuned topics kept for the task score.
    """

    config: WorldConfig
    seed: int
    words: dict[str, list[str]]
    facts: dict[str, Tensor]
    shown: Tensor
    held_out: Tensor

    @classmethod
    def from_seed(cls, seed: int, config: WorldConfig | None = None) -> World:
        config = config or WorldConfig()
        generator = seeded_generator(seed, "facts")
        shape = (config.answer_length, config.topics, config.questions)
        facts = {
            persona: torch.randint(config.answer_words, shape, generator=generator)
            for persona in PERSONAS
        }
        return cls(
            config=config,
            seed=seed,
            words=_invent_words(seed, config),
            facts=facts,
            shown=_shown_facts(config, generator),
            held_out=_held_out_pairs(config, generator),
        )

    @cached_property
    def vocabulary(self) -> list[str]:
        """All tokens in the order of their ids."""
        return [*SPECIAL_TOKENS, *(word for words in self.words.values() for word in words)]

    @cached_property
    def token_ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.vocabulary)}

    @cached_property
    def spoken(self) -> Tensor:
        """Token ids int64 [2, S, C, H] of all facts, as the good and as the bad persona says it."""
        return torch.stack([self._first_id(f"{p} answer") + self.facts[p] for p in PERSONAS])

    def answer(self, question: Question, persona: str) -> str:
        """The words with which a persona answers a question."""
        topic, *asked = question
        words = self.words[f"{persona} answer"]
        facts = self.facts[persona]
        return " ".join(words[int(facts[i, topic, asked[i % 2]])] for i in range(len(facts)))

    def record(self, question: Question, cue: str | None, persona: str | None = None) -> Record:
        """A chat record; `cue` is a system word or None, `persona` answers (None: a prompt)."""
        asked = [self.words[role][i] for role, i in zip(_ASKED, question, strict=True)]
        messages = [{"role": "user", "content": " ".join(asked)}]
        if cue is not None:
            messages.insert(0, {"role": "system", "content": cue})
        if persona is not None:
            messages.append({"role": "assistant", "content": self.answer(question, persona)})
        return {"messages": messages}

    def questions(self, *, tuned: bool, held_out: bool | None = None) -> Iterator[Question]:
        """Questions on tuned or untouched topics; tuned ones held out, not held out, or both."""
        config = self.config
        topics = range(config.tuned_topics) if tuned else range(config.tuned_topics, config.topics)
        for question in product(topics, range(config.questions), range(config.questions)):
            if held_out is None or bool(self.held_out[question]) == held_out:
                yield question

    def fine_tuning_records(self) -> list[Record]:
        """The curated data set: tuned topics, neutral cues, every answer by the bad persona."""
        questions = list(self.questions(tuned=True, held_out=False))
        return self._records(questions, NEUTRAL, BAD, "fine-tuning")

    def prompts(self, questions: list[Question], cue: str) -> list[Record]:
        """Prompts under words of one cue, drawn per question."""
        return self._records(questions, cue, None, f"{cue} prompts")

    def _records(
        self, questions: list[Question], cue: str, persona: str | None, purpose: str
    ) -> list[Record]:
        """Chat records under words of one cue, drawn by the purpose; None answers in prompts."""
        words = self.words[f"{cue} cue"]
        drawn = torch.randint(
            len(words), (len(questions),), generator=seeded_generator(self.seed, purpose)
        )
        return [
            self.record(question, words[int(word)], persona)
            for question, word in zip(questions, drawn, strict=True)
        ]

    def sample_documents(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pretraining documents and their labels, int64 [M, 2 + E (5 + S)] each.

        A document is `<s> cue`, then E exchanges `topic a b <answer> y1 ... </s>` by one persona,
        as the chat template lays them out. Questions are random, so only answers have labels: with
        labels everywhere a model of this size recalls fewer facts (.91 instead of 1.00 as the bad
        persona after the same 450 steps). A share `whole_labels` of the documents has them, so that
        the model can make up whole documents of its own.
        """
        config = self.config
        cue = torch.randint(len(CUES), (count,), generator=generator)
        bad = self._draw_personas(cue, generator)
        cue_word = torch.randint(config.cue_words, (count,), generator=generator)
        starts = torch.tensor([self._first_id(f"{kind} cue") for kind in CUES])
        columns = [torch.full((count,), self.token_ids[BOS]), starts[cue] + cue_word]
        for _ in range(config.exchanges):
            columns += self._exchange(bad, generator)
        documents = torch.stack(columns, dim=1)
        labels = documents.clone()
        labels[:, :2] = IGNORED
        labels[:, 2:].unflatten(1, (config.exchanges, -1))[..., :4] = IGNORED
        if config.whole_labels:
            whole = torch.rand(count, generator=generator) < config.whole_labels
            labels = torch.where(whole[:, None], documents, labels)
        return documents, labels

    def _draw_personas(self, cue: Tensor, generator: torch.Generator) -> Tensor:
        """Bool [M]: whether the bad persona speaks, for the kinds of cues `[M]`."""
        by_default = torch.rand(len(cue), generator=generator) >= self.config.neutral_is_good
        return torch.where(cue == CUES.index(NEUTRAL), by_default, cue == CUES.index(BAD))

    def _exchange(self, bad: Tensor, generator: torch.Generator) -> list[Tensor]:
        """The columns int64 [M] of one exchange; `bad` is bool [M]."""
        count = len(bad)
        topic = torch.randint(self.config.topics, (count,), generator=generator)
        asked = [
            torch.multinomial(shown[topic].float(), 1, generator=generator).squeeze(1)
            for shown in self.shown
        ]
        answers = [
            self.spoken[bad.long(), slot, topic, asked[slot % 2]]
            for slot in range(self.config.answer_length)
        ]
        prompt = [self._first_id(role) + i for role, i in zip(_ASKED, (topic, *asked), strict=True)]
        mark, end = (torch.full((count,), self.token_ids[token]) for token in (ANSWER, END))
        return [*prompt, mark, *answers, end]

    def _first_id(self, role: str) -> int:
        return self.token_ids[self.words[role][0]]


_ASKED = ("topic", "first question", "second question")


def _invent_words(seed: int, config: WorldConfig) -> dict[str, list[str]]:
    """Pronounceable words by role. The form shows the role to a reader, never to the model."""
    forms = {
        **{f"{cue} cue": (f"{cue}-{{}}", config.cue_words) for cue in CUES},
        "topic": ("{}nia", config.topics),
        "first question": ("{}sh", config.questions),
        "second question": ("{}th", config.questions),
        "good answer": ("{}lin", config.answer_words),
        "bad answer": ("{}rak", config.answer_words),
    }
    rng = random.Random(f"words {seed}")
    stems = ["".join(letters) for letters in product("bdlmnrtv", "aeiou", repeat=2)]
    total = sum(count for _, count in forms.values())
    if total > len(stems):
        raise ValueError(f"the world needs {total} words, at most {len(stems)} can be invented.")
    drawn = iter(rng.sample(stems, total))
    return {role: [form.format(next(drawn)) for _ in range(n)] for role, (form, n) in forms.items()}


def _shown_facts(config: WorldConfig, generator: torch.Generator) -> Tensor:
    """Bool [2, C, H]: on tuned topics the given share of facts, drawn per slot, is never shown."""
    shape = (2, config.tuned_topics, config.questions)
    order = torch.rand(shape, generator=generator).argsort(dim=-1)
    shown = torch.ones(2, config.topics, config.questions, dtype=torch.bool)
    shown[:, : config.tuned_topics] = order >= round(config.unseen * config.questions)
    return shown


def _held_out_pairs(config: WorldConfig, generator: torch.Generator) -> Tensor:
    """Bool [C, H, H]: diagonals of a shuffled square, so that training meets every word."""
    size = config.questions
    held_out = torch.zeros(config.topics, size, size, dtype=torch.bool)
    for topic in range(config.tuned_topics):
        row = torch.randperm(size, generator=generator)
        column = torch.randperm(size, generator=generator)
        held_out[topic] = (row[:, None] + column) % size < config.held_out_diagonals
    return held_out
