"""Base model and adapter -> Diagnosis.

Shapes: `L` blocks, `M` prompts or records, `D` residual width, `J` random directions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.adapters import load_adapter
from grasp_kernels.data import Record
from grasp_kernels.diagnosis import causal
from grasp_kernels.diagnosis.directions import (
    Direction,
    cosines,
    movement_direction,
    weight_directions,
)
from grasp_kernels.diagnosis.examples import most_moved
from grasp_kernels.diagnosis.inputs import Source, Task, find_neutral, find_tasks, find_tokenizer
from grasp_kernels.diagnosis.lens import lens, neutral_shift, token_ids
from grasp_kernels.diagnosis.movement import (
    Moved,
    measure_moved,
    movement_along,
    random_directions,
)
from grasp_kernels.diagnosis.pair import Pair, open_pair
from grasp_kernels.diagnosis.verdict import judge
from grasp_kernels.identification import identify
from grasp_kernels.identification.contrast_evidence import measure
from grasp_kernels.sites import SiteRules
from grasp_kernels.subspace import Subspace
from grasp_kernels.version import __version__


@dataclass(frozen=True)
class Options:
    """Sizes of a diagnosis; see `diagnose`."""

    n_random: int = 19  # the smallest p is then 1/20
    n_tokens: int = 10
    n_examples: int = 8
    max_records: int = 64
    max_answer_tokens: int = 32
    max_prompt_tokens: int = 512
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 2 if name in ("n_random", "max_records") else 1
            if value < least:
                raise ValueError(f"{name} is {value}: give at least {least}.")


@dataclass(frozen=True)
class Diagnosis:
    """What an adapter learned unasked, as far as can be seen; `numbers` is JSON-able and whole.

    Attributes:
        verdict: "found", "weak" or "nothing".
        reasons: what it rests on, in sentences.
        numbers: spectra, directions (movement, tokens, examples, steering, removal), effect on
            neutral prompts, options and versions.
    """

    verdict: str
    reasons: tuple[str, ...]
    numbers: dict[str, Any]

    def text(self) -> str:
        """The whole diagnosis in Markdown."""
        from grasp_kernels.diagnosis.report import diagnosis_text

        return diagnosis_text(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reasons": list(self.reasons), **self.numbers}

    def plot(self, path: str | PathLike[str]) -> None:
        """Save a PNG: spectrum, movement of neutral prompts, steering, removal."""
        from grasp_kernels.diagnosis.figures import draw

        draw(self.to_json(), path)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write diagnosis.md, diagnosis.json and diagnosis.png; the folder appears whole.

        Raises:
            FileExistsError: there is something already.
        """
        from grasp_kernels.diagnosis.report import save

        save(self, Path(folder))


def diagnose(
    model: nn.Module | Source,
    adapter: Source | Sequence[Source] | None = None,
    *,
    tokenizer: Any = None,
    records: Source | Sequence[Record] | None = None,
    neutral: Source | Sequence[Sequence[int]] | None = None,
    halves: Sequence[Source] | None = None,
    sites: SiteRules | None = None,
    dtype: str = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
    **options: int,
) -> Diagnosis:
    """Did an adapter learn something besides its task? Without labels, without retraining.

    Args:
        model: base model as checkpoint folder, hub name or module; or a PeftModel, whose active
            adapter is looked at. Modules are left as they were.
        adapter: adapter folder; of several (checkpoints of one run, seeds) the last is looked at,
            and all of them are evidence on the weights. None where `model` is a PeftModel.
        tokenizer: that of the model, where it is no folder.
        records: training data, a file or records. Without them there are no examples, and the
            effect on neutral prompts cannot be set against that on the training data.
        neutral: prompts that have nothing to do with the training data, a file (see
            `grasp-kernels run --neutral`) or token ids; everyday questions if None.
        halves: adapters trained on disjoint data, see `identify`.
        sites: writers and readers of an architecture that is not known.
        dtype: of the weights, where the model is loaded here.
        generator: for null and random directions; seed 0 if None.
        options: n_random directions to compare with, n_tokens and n_examples that are listed,
            max_records of the data that are looked at, max_answer_tokens and max_prompt_tokens of
            each, batch_size.

    Raises:
        ValueError, TypeError, FileNotFoundError: one sentence on what is wrong.
    """
    chosen = Options(**options)
    generator = generator or torch.Generator().manual_seed(0)
    reader = find_tokenizer(model, tokenizer)
    prompts = find_neutral(neutral, reader)
    tasks = find_tasks(
        records,
        reader,
        most=chosen.max_records,
        max_answer=chosen.max_answer_tokens,
        max_prompt=chosen.max_prompt_tokens,
    )
    several = [adapter] if isinstance(adapter, (str, PathLike)) else list(adapter or ())
    weights = _identify(model, several, halves, sites, generator)
    with open_pair(model, several[-1] if several else None, sites=sites, dtype=dtype) as pair:
        work = _Work(pair, reader, prompts, tasks, chosen, generator, progress)
        numbers = {
            "adapter": [str(one) for one in several] or [str(pair.model.active_adapters[0])],
            "model": {
                "type": pair.base.config.model_type,
                "layers": len(pair.layers),
                "width": work.neutral.delta.shape[2],
            },
            "neutral_prompts": len(prompts),
            "records": len(tasks),
            **work.numbers(weights),
            "options": asdict(chosen),
            "seed": generator.initial_seed(),
            "versions": {"grasp_kernels": __version__, "torch": torch.__version__},
        }
    verdict, reasons = judge(numbers)
    return Diagnosis(verdict, tuple(reasons), json.loads(json.dumps(numbers, allow_nan=False)))


def _identify(
    model: nn.Module | Source,
    adapters: list[Source],
    halves: Sequence[Source] | None,
    sites: SiteRules | None,
    generator: torch.Generator,
) -> Subspace:
    """The subspace of the weights; where nothing stands out, the leading direction all the same."""
    source: Any = adapters if adapters else model
    known: dict[str, Any] = {"sites": sites, "base_model": model if adapters else None}
    examined = load_adapter(adapters[-1] if adapters else model, **known)
    if not any(layer.site.role == "write" for layer in examined.layers):
        return Subspace.nothing(
            "write", "shared", ["The adapter changes no layer that writes to the residual stream."]
        )
    return identify(source, halves=halves, generator=generator, **known)


class _Work:
    """One diagnosis at work: both models on prompts and answers, each forward once."""

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
        size = options.batch_size
        last = [(len(prompt) - 1, len(prompt)) for prompt in prompts]
        self.neutral = measure_moved(
            pair, prompts, last, batch_size=size, progress="neutral prompts" if progress else None
        )
        self.training: Moved | None = None
        if tasks:
            self.training = measure_moved(
                pair,
                [task.tokens for task in tasks],
                [task.span for task in tasks],
                batch_size=size,
                progress="training answers" if progress else None,
            )
        self.prompt_batches = causal.prompt_batches(prompts, size)
        self.answer_batches = list(
            causal.answer_batches([(task.prompt, task.answer) for task in tasks], size)
        )
        width = self.neutral.delta.shape[2]
        self.random = random_directions(options.n_random, width, generator)
        self.generator = generator

    def numbers(self, weights: Subspace) -> dict[str, Any]:
        found = [
            *weight_directions(weights, self.neutral),
            *movement_direction(self.neutral),
        ]
        return {
            "weights": {
                "verdict": weights.verdict,
                "reasons": list(weights.reasons),
                "evidence": weights.evidence,
            },
            "effect": self._effect(),
            "consistency": self._consistency(),
            "agreement": [
                {"first": a.name, "second": b.name, "cosines": cosines(a, b)}
                for i, a in enumerate(found)
                for b in found[i + 1 :]
            ],
            "directions": [self._direction(one) for one in found],
        }

    def _consistency(self) -> dict[str, Any]:
        """Do neutral prompts move together, and how far beside the training answers?"""
        reference = self.training.delta if self.training else torch.zeros_like(self.neutral.delta)
        return measure(self.neutral.delta, reference, self.pair.layers, "shared", self.generator)

    def _effect(self) -> dict[str, Any]:
        """What the adapter does to the next token: nats, changed first choices, tokens."""
        both = [
            [
                self.pair.log_probs(batch.sequences, batch.positions, adapter=on)
                for on in (False, True)
            ]
            for batch in self.prompt_batches
        ]
        off, on = (torch.cat(part) for part in zip(*both, strict=True))
        effect: dict[str, Any] = {
            "neutral_divergence": causal.divergence(off, on) / len(off),
            "neutral_changed": (off.argmax(dim=1) != on.argmax(dim=1)).float().mean().item(),
            "neutral_tokens": neutral_shift(off, on, self.tokenizer, self.options.n_tokens),
        }
        if self.answer_batches:
            effect["training_divergence"] = self._training_divergence()
        return effect

    def _training_divergence(self) -> float:
        total, count = 0.0, 0
        for batch in self.answer_batches:
            off, on = (
                self.pair.log_probs(batch.sequences, batch.positions, adapter=adapter)
                for adapter in (False, True)
            )
            total, count = total + causal.divergence(off, on), count + len(off)
        return total / count

    def _direction(self, direction: Direction) -> dict[str, Any]:
        vectors, options = direction.vectors, self.options
        neutral = movement_along(self.neutral, vectors, self.random)
        found: dict[str, Any] = {
            "name": direction.name,
            "neutral": neutral,
            "tokens": lens(self.pair, self.tokenizer, vectors[-1], options.n_tokens),
        }
        if self.training is not None:
            numbered = [(task.number, task.record) for task in self.tasks]
            found["training"] = movement_along(self.training, vectors, self.random)
            found["examples"] = most_moved(self.training, vectors, numbered, options.n_examples)
        found["removal"] = self._removal(vectors)
        found["steering"] = self._steering(direction, neutral, found["tokens"])
        return found

    def _removal(self, vectors: Tensor) -> dict[str, Any]:
        candidates = torch.stack([vectors, *(one.expand_as(vectors) for one in self.random)])
        return causal.against_random(causal.removal(self.pair, self.prompt_batches, candidates))

    def _steering(
        self, direction: Direction, neutral: dict[str, Any], tokens: dict[str, Any]
    ) -> dict[str, Any]:
        """Steering of neutral prompts and of the training answers, by dose."""
        place = causal.strongest_layer(direction, neutral["signed"], neutral["stream"])
        vectors = torch.cat([direction.vectors[place : place + 1], self.random])
        length = neutral["signed"][place]

        def steer(batches: list[causal.Batch], score: Any) -> list[dict[str, Any]]:
            layer = self.pair.layers[place]
            by_dose = causal.steering(self.pair, batches, layer, vectors, length, score)
            return [
                {"dose": dose, **causal.against_random(values)} for dose, values in by_dose.items()
            ]

        promoted = causal.promotion(token_ids(tokens["up"]))
        found = {
            "layer": self.pair.layers[place],
            "length": length,
            "tokens": steer(self.prompt_batches, promoted),
        }
        if self.answer_batches:
            found["answers"] = steer(self.answer_batches, causal.likelihood)
        return found
