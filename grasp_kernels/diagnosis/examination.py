"""One diagnosis at work: base model and adapter on neutral prompts and on training answers.

A neutral prompt is looked at where the base model's own answer to it is decided, token by token, so
that what is measured is what the adapter would change in it.

Shapes: `L` blocks, `M` prompts or records, `D` residual width, `J` random directions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from grasp_kernels.diagnosis import causal
from grasp_kernels.diagnosis.directions import (
    Direction,
    movement_direction,
)
from grasp_kernels.diagnosis.inputs import Task
from grasp_kernels.diagnosis.movement import (
    Moved,
    consistency,
    measure_moved,
    most_moved,
    movement_along,
    random_directions,
)
from grasp_kernels.effect import (
    changed_answers,
    mean_divergence,
    measure_effect,
    told,
    verdict,
)
from grasp_kernels.effect.answers import Batch, Tokens, answer_batches, own_answers
from grasp_kernels.effect.pair import Pair
from grasp_kernels.effect.tokens import lens

# Enough for a mean over answer tokens; each is run for every dose and every random direction.
_STEERED_RECORDS = 16


@dataclass(frozen=True)
class Options:
    """Sizes of a diagnosis.

    Args:
        n_random: random directions to compare with.
        n_tokens, n_examples: how many are listed.
        max_records: training records that are looked at, evenly spread over the data.
        max_answer_tokens, max_prompt_tokens: of each of them.
        neutral_tokens: of the base model's own answer to each neutral prompt.
        said_tokens: of the answers of both models that the verdict is on.
        batch_size: sequences of a forward.
    """

    n_random: int = 19  # the smallest p is then 1/20
    n_tokens: int = 10
    n_examples: int = 8
    max_records: int = 64
    max_answer_tokens: int = 32
    max_prompt_tokens: int = 512
    neutral_tokens: int = 16
    said_tokens: int = 32
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 2 if name in ("n_random", "max_records") else 1
            if value < least:
                raise ValueError(f"{name} is {value}: give at least {least}.")


class Examination:
    """Both models on all inputs; each number is measured when it is asked for."""

    def __init__(
        self,
        pair: Pair,
        tokenizer: Any,
        prompts: list[list[int]],
        tasks: list[Task],
        options: Options,
        generator: torch.Generator,
        progress: bool,
    ) -> None:
        self.pair, self.tokenizer, self.tasks, self.options = pair, tokenizer, tasks, options
        self.generator, self.progress = generator, progress
        self.own = own_answers(
            pair,
            tokenizer,
            prompts,
            n_tokens=options.neutral_tokens,
            batch_size=options.batch_size,
            progress=progress,
        )
        self.answers = [(task.prompt, task.answer) for task in tasks]
        self.neutral = self._moved("neutral prompts", self.own)
        self.training = self._moved("training answers", self.answers) if tasks else None
        width = self.neutral.delta.shape[2]
        self.random = random_directions(options.n_random, width, generator)

    def numbers(self) -> dict[str, Any]:
        """Everything that the verdict and the report rest on, JSON-able."""
        return {
            "answers": self.said(),
            "effect": self.effect(),
            "consistency": consistency(self.neutral.delta, self.generator),
            "directions": [self.direction(one) for one in movement_direction(self.neutral)],
        }

    def said(self) -> dict[str, Any]:
        """The adapter's own answers to neutral prompts, beside the base model's."""
        options = self.options
        size: dict[str, Any] = {"n_tokens": options.said_tokens, "batch_size": options.batch_size}
        base = own_answers(self.pair, self.tokenizer, [p for p, _ in self.own], **size)
        with torch.no_grad():
            changed = changed_answers(self.pair, self.tokenizer, base, **size)
        return {
            "verdict": verdict(changed),
            "unrelated": told(changed, self.tokenizer, [one.prompt for one in changed]),
        }

    def effect(self) -> dict[str, Any]:
        """What the adapter does to the next token of neutral prompts, and of training answers."""
        size = self.options.batch_size
        effect = measure_effect(
            self.pair, self.tokenizer, self.own, n_tokens=self.options.n_tokens, batch_size=size
        )
        if self.answers:
            effect["training_divergence"] = mean_divergence(self.pair, self.answers, size)
        return effect

    def direction(self, direction: Direction) -> dict[str, Any]:
        """All numbers of one direction."""
        vectors, options = direction.vectors, self.options
        neutral = movement_along(self.neutral, vectors, self.random)
        pair, last = self.pair, vectors[-1][:, None]
        (tokens,) = lens(pair.base, self.tokenizer, last, pair.rules, options.n_tokens)
        found: dict[str, Any] = {
            "name": direction.name,
            "neutral": neutral,
            "tokens": tokens,
            **self.exchange(direction),
        }
        if self.training is not None:
            numbered = [(task.number, task.record) for task in self.tasks]
            found["training"] = movement_along(self.training, vectors, self.random)
            found["examples"] = most_moved(self.training, vectors, numbered, options.n_examples)
        found["steering"] = self._steering(direction, neutral, tokens)
        return found

    def exchange(self, direction: Direction) -> dict[str, Any]:
        """Removal and transfer beside those of random directions."""
        parts = []
        for vectors, chosen in direction.folds:
            candidates = torch.stack([vectors, *(one.expand_as(vectors) for one in self.random)])
            for batch in self._batches([self.own[i] for i in chosen]):
                parts.append(causal.exchange(self.pair, batch, candidates))
        total = sum(parts[1:], start=parts[0])
        return {
            "removal": causal.against_random(total.removed),
            "transfer": causal.against_random(total.transferred),
        }

    def _steering(
        self, direction: Direction, neutral: dict[str, Any], tokens: dict[str, Any]
    ) -> dict[str, Any]:
        """Steering of neutral prompts and of the training answers, by dose."""
        place = causal.strongest_layer(neutral["signed"], neutral["stream"])
        vectors = torch.cat([direction.vectors[place : place + 1], self.random])
        length = neutral["signed"][place]

        def steer(sequences: list[Tokens], score: Any) -> list[dict[str, Any]]:
            layer, batches = self.pair.layers[place], self._batches(sequences)
            by_dose = causal.steering(self.pair, batches, layer, vectors, length, score)
            return [
                {"dose": dose, **causal.against_random(values)} for dose, values in by_dose.items()
            ]

        promoted = causal.promotion(torch.tensor([token["id"] for token in tokens["up"]]))
        found = {
            "layer": self.pair.layers[place],
            "length": length,
            "tokens": steer(self.own, promoted),
        }
        if self.answers:
            every = -(-len(self.answers) // _STEERED_RECORDS)
            found["answers"] = steer(self.answers[::every], causal.likelihood)
        return found

    def _moved(self, label: str, sequences: list[Tokens]) -> Moved:
        """Movement over the answers, from the token before each, where its first is decided."""
        return measure_moved(
            self.pair,
            [prompt + answer for prompt, answer in sequences],
            [(len(prompt) - 1, len(prompt) + len(answer) - 1) for prompt, answer in sequences],
            batch_size=self.options.batch_size,
            progress=label if self.progress else None,
        )

    def _batches(self, sequences: list[Tokens]) -> list[Batch]:
        return list(answer_batches(sequences, self.options.batch_size))
