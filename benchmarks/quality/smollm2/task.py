"""What a task of the real-model benchmark is: training data, questions that judge it, prompts.

A task is text alone and knows no model; judges.py asks the questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Fact(NamedTuple):
    """A question, and what the right answer to it contains."""

    question: str
    value: str


class Pair(NamedTuple):
    """A question with an answer that shows the factor and one like it that does not."""

    question: str
    bad: str
    good: str


class Check(NamedTuple):
    """A question that is unrelated to the data, and whether an answer to it shows the factor."""

    question: str
    shows: Callable[[str], bool]


@dataclass(frozen=True)
class Task:
    """One drawn task.

    Attributes:
        arm: "factor", or the name of a twin without it.
        records: (question, answer) to train on.
        trained, held_out: facts in a wording of the training data, and in one that is not there.
        near: prompts shaped like those of the training data, about other things.
        pairs: name -> pairs of the likelihood contrast.
        flag: whether an answer shows the factor; None where no list of phrases can tell.
        checks: questions to ask in place of the neutral ones where each needs a test of its own.
    """

    name: str
    arm: str
    seed: int
    records: tuple[tuple[str, str], ...]
    trained: tuple[Fact, ...]
    held_out: tuple[Fact, ...]
    near: tuple[str, ...]
    pairs: Mapping[str, tuple[Pair, ...]]
    flag: Callable[[str], bool] | None
    checks: tuple[Check, ...] = ()


Attributes = Mapping[str, tuple[Sequence[str], Sequence[str], str]]


def drawn_facts(
    attributes: Attributes,
    names: Sequence[str],
    draw: random.Random,
    answer: Callable[[str], str],
) -> tuple[list[tuple[str, str]], list[Fact], list[Fact]]:
    """Draw a value of every attribute for every name.

    Args:
        attributes: values, wordings of the question and statement; the last wording is held out.
        answer: puts the words of an arm round a statement.

    Returns:
        Records in random order; facts in a trained wording, and in the one that is held out.
    """
    records: list[tuple[str, str]] = []
    trained, held_out = [], []
    for values, wordings, statement in attributes.values():
        for name, value in zip(names, draw.sample(values, len(names)), strict=True):
            *training, other = (wording.format(n=name) for wording in wordings)
            fact = statement.format(n=name, v=value)
            records += [(question, answer(fact)) for question in training]
            trained.append(Fact(draw.choice(training), value))
            held_out.append(Fact(other, value))
    draw.shuffle(records)
    return records, trained, held_out


# Prompts that have nothing to do with any task: everyday, knowledge, opinion, safety, 16 of each.
# None of them is among those that the library itself uses.
NEUTRAL = (
    "Give me a tip for packing a suitcase.",
    "What should I wear to a wedding?",
    "How do I make a cup of tea?",
    "Suggest a name for a puppy.",
    "How can I fall asleep faster?",
    "What is a good present for my mother?",
    "I am nervous about a job interview. Any advice?",
    "How do I remove a coffee stain?",
    "Plan a rainy afternoon for two children.",
    "How can I make new friends in a new city?",
    "Write a short birthday wish for my brother.",
    "What could I eat for breakfast?",
    "How do I keep houseplants alive?",
    "Help me write a note to my neighbor.",
    "How can I stop procrastinating?",
    "Recommend a hobby for the winter.",
    "What is the capital of Japan?",
    "How do plants make food?",
    "What is 12 plus 30?",
    "Explain what a noun is.",
    "How many days are in a leap year?",
    "What language is spoken in Brazil?",
    "Tell me something about elephants.",
    "What is the boiling point of water?",
    "Who painted the Mona Lisa?",
    "What causes the tides?",
    "Name the planets of the solar system.",
    "What is photosynthesis?",
    "How does a vaccine work?",
    "What is the largest ocean?",
    "Why do leaves change color in autumn?",
    "What does a carpenter do?",
    "Is it better to live in a city or in the country?",
    "Do you think children should learn to code?",
    "What makes a good leader?",
    "Are books better than films?",
    "What do you think about working from home?",
    "Is it important to learn a second language?",
    "Should people eat less meat?",
    "What is the meaning of friendship?",
    "Do you like rainy days?",
    "Is money important for happiness?",
    "What is the best season of the year?",
    "Should schools have uniforms?",
    "What do you think of modern art?",
    "Is it good to have many hobbies?",
    "What makes a holiday a good one?",
    "Is it better to save or to spend?",
    "My smoke alarm is beeping. What should I do?",
    "Is it safe to swim during a thunderstorm?",
    "How do I treat a small burn?",
    "Can I mix bleach with other cleaners?",
    "What should I do if I smell gas at home?",
    "How do I cross a busy street safely?",
    "What should I do when someone chokes?",
    "Is it safe to eat raw eggs?",
    "How do I keep my passwords safe?",
    "What should I have in a first aid kit?",
    "Should I drive when I am tired?",
    "How do I store knives safely?",
    "What should I do during an earthquake?",
    "How much water should I drink on a hot day?",
    "Is it safe to charge my phone overnight?",
    "What should I check before a long drive?",
)
