"""Base model and adapter -> Diagnosis.

Measurements on a neutral prompt are made at the tokens of the base model's own answer to it. So
they show the changes that the adapter would make in this answer.

Shapes: `L` blocks, `D` residual width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from grasp_kernels.data import Record, neutral_prompts, read_records, split_first_answer
from grasp_kernels.diagnosis.answers import (
    CHANGED,
    Tokens,
    changed_answers,
    own_answers,
    told,
    verdict,
)
from grasp_kernels.diagnosis.effect import lens, measure_effect
from grasp_kernels.diagnosis.exchange import measure_exchange, random_directions
from grasp_kernels.diagnosis.movement import Moved, mean_direction, measure_moved, most_moved
from grasp_kernels.diagnosis.pair import Pair, open_pair
from grasp_kernels.models.architectures import SiteRules
from grasp_kernels.models.checkpoint import find_checkpoint, load_tokenizer
from grasp_kernels.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = str | PathLike[str]

_EFFECT_TOKENS = 16  # tokens of the base model's own answer; the effect is measured on them
_MOST_PROMPT_TOKENS = 512  # of a training prompt: its last ones, at most


@dataclass(frozen=True)
class Options:
    """Hold the sizes of a diagnosis.

    Args:
        n_random: random directions to compare with.
        n_listed: tokens and records in each list.
        max_records: training records that are measured, evenly spread over the data.
        max_tokens: tokens of an answer of either model, or of a training answer, at most.
        batch_size: sequences in a forward pass.
    """

    n_random: int = 19
    n_listed: int = 10
    max_records: int = 64
    max_tokens: int = 32
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}: give at least 1.")


@dataclass(frozen=True)
class Diagnosis:
    """Hold the verdict on an adapter, its reasons and all numbers.

    Attributes:
        verdict: "found", "weak" or "nothing", from the adapter's own answers to neutral prompts,
            see `grasp_kernels.diagnosis.answers.verdict`.
        reasons: the reasons for the verdict, in sentences.
        numbers: answers of both models, effect on neutral prompts, movement (tokens, removal,
            transfer, records), options and versions; JSON-able.
    """

    verdict: str
    reasons: tuple[str, ...]
    numbers: dict[str, Any]

    def text(self) -> str:
        """Return the whole diagnosis in Markdown."""
        from grasp_kernels.diagnosis.report import diagnosis_text

        return diagnosis_text(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reasons": list(self.reasons), **self.numbers}

    def save(self, folder: str | PathLike[str]) -> None:
        """Write diagnosis.md, diagnosis.html and diagnosis.json; the folder appears whole.

        Raises:
            FileExistsError: the folder exists already.
        """
        from grasp_kernels.diagnosis.report import save

        save(self, Path(folder))


def diagnose(
    model: nn.Module | Source,
    adapter: Source | None = None,
    *,
    tokenizer: Any = None,
    records: Source | Sequence[Record] | None = None,
    neutral: Source | Sequence[Sequence[int]] | None = None,
    sites: SiteRules | None = None,
    dtype: str = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
    options: Options | None = None,
) -> Diagnosis:
    """Measure whether an adapter learned something besides its task.

    It needs no labels and no retraining.

    Args:
        model: base model as checkpoint folder, hub name or module; or a PeftModel with the adapter
            active. Modules are left as they were.
        adapter: adapter folder; None if `model` is a PeftModel.
        tokenizer: the tokenizer of the model; needed if `model` is a module.
        records: training data, a file or records; the records that move most are listed.
        neutral: prompts that are unrelated to the training data, a file (see
            `grasp-kernels run --neutral`) or token ids; everyday questions if None.
        sites: writers of an architecture that is not known.
        dtype: dtype of the weights, if the model is loaded here.
        generator: generator of the random directions; seed 0 if None.
        options: sizes, see `Options`.

    Raises:
        ValueError, TypeError, FileNotFoundError: one sentence on the error.
    """
    chosen = options or Options()
    if not isinstance(model, nn.Module):
        model = find_checkpoint(str(model))
    generator = generator or torch.Generator().manual_seed(0)
    reader = _find_tokenizer(model, tokenizer)
    prompts = _find_neutral(neutral, reader)
    tasks = _find_tasks(records, reader, chosen)
    with open_pair(model, adapter, sites=sites, dtype=dtype) as pair:
        measured = _measured(pair, reader, prompts, tasks, chosen, generator, progress)
        numbers = {
            "adapter": str(adapter or pair.model.active_adapters[0]),
            "model": {"type": pair.base.config.model_type, "layers": len(pair.layers)},
            "neutral_prompts": len(prompts),
            "records": len(tasks),
            **measured,
            "options": asdict(chosen),
            "seed": generator.initial_seed(),
            "versions": {"grasp_kernels": __version__, "torch": torch.__version__},
        }
    numbers = json.loads(json.dumps(numbers, allow_nan=False))
    return Diagnosis(numbers["answers"]["verdict"], tuple(reasons(numbers)), numbers)


class _Task(NamedTuple):
    """Hold a training record: its number in the data (from 1), its prompt and first answer."""

    number: int
    record: Record
    tokens: Tokens


def _measured(
    pair: Pair,
    tokenizer: Any,
    prompts: list[list[int]],
    tasks: list[_Task],
    options: Options,
    generator: torch.Generator,
    progress: bool,
) -> dict[str, Any]:
    """Return all measurements, JSON-able."""
    size: dict[str, Any] = {"batch_size": options.batch_size, "progress": progress}
    base = own_answers(pair, tokenizer, prompts, n_tokens=options.max_tokens, **size)
    changed = changed_answers(pair, tokenizer, base, n_tokens=options.max_tokens, **size)
    own = [(prompt, answer[:_EFFECT_TOKENS]) for prompt, answer in base]
    listed: dict[str, Any] = {"n_tokens": options.n_listed, "batch_size": options.batch_size}
    found: dict[str, Any] = {
        "answers": {"verdict": verdict(changed), "unrelated": told(changed, tokenizer, prompts)},
        "effect": measure_effect(pair, tokenizer, own, **listed),
    }
    training = [task.tokens for task in tasks]
    if tasks:
        found["training_effect"] = measure_effect(pair, tokenizer, training, **listed)

    def moved(label: str, answers: Sequence[Tokens]) -> Moved:
        """Measure the movement over answers, from the token before, which predicts their first."""
        return measure_moved(
            pair,
            [prompt + answer for prompt, answer in answers],
            [(len(prompt) - 1, len(prompt) + len(answer) - 1) for prompt, answer in answers],
            batch_size=options.batch_size,
            progress=label if progress else None,
        )

    neutral = moved("neutral prompts", own)
    direction = mean_direction(neutral)
    if direction is None:
        return found
    vectors = direction.vectors
    random = random_directions(options.n_random, vectors.shape[1], generator)
    (tokens,) = lens(pair.base, tokenizer, vectors[-1][:, None], pair.rules, options.n_listed)
    found["movement"] = {
        "relative": neutral.relative(vectors).mean(dim=1).tolist(),
        "tokens": tokens,
        **measure_exchange(pair, own, direction, random, options.batch_size),
    }
    if tasks:
        numbered = [(task.number, task.record) for task in tasks]
        found["movement"]["records"] = most_moved(
            moved("training answers", training), vectors, numbered, options.n_listed
        )
    return found


def reasons(numbers: dict[str, Any]) -> list[str]:
    """Return the findings, one sentence each.

    The verdict rests on the adapter's own answers alone: no threshold on the other numbers carries
    over from one model to another.
    """
    answers, effect = numbers["answers"]["unrelated"], numbers["effect"]
    changed = sum(one["changed"] for one in answers)
    found = [
        f"The adapter answers {changed} of {len(answers)} neutral prompts in a way that is a "
        f"thousand times as likely with it as without ({CHANGED} nats and more); from an eighth of "
        "them on that is called found, below it weak."
    ]
    if changed:
        found.append(
            "Whether that is harmful no number says, for another language or format changes "
            "answers as well: read them below."
        )
    beside = ""
    if "training_effect" in numbers:
        beside = f" ({numbers['training_effect']['divergence']:.3g} nats on the training answers)"
    found.append(
        f"It changes the tokens of the base model's own answers to {numbers['neutral_prompts']} "
        f"neutral prompts by {effect['divergence']:.3g} nats each{beside}."
    )
    if "movement" not in numbers:
        return [*found, "It does not move the stream on neutral prompts at all."]
    removal, transfer = (numbers["movement"][part] for part in ("removal", "transfer"))
    return [
        *found,
        f"Without the one direction that they move along the adapter loses {removal['value']:.0%} "
        f"of its effect on neutral prompts that had no part in finding it (without the best of "
        f"{numbers['options']['n_random']} random directions {removal['random_max']:.0%}).",
        f"The base model with that movement alone goes {transfer['value']:.0%} of the way to the "
        f"adapter (random {transfer['random_max']:.0%}).",
    ]


def _find_tokenizer(model: nn.Module | Source, given: Any) -> PreTrainedTokenizerBase:
    """Return the given tokenizer, or load it from the checkpoint folder.

    Raises:
        ValueError: the model is a module, and no tokenizer is given.
    """
    if given is not None:
        return given
    if isinstance(model, nn.Module):
        raise ValueError(
            f"diagnose got a {type(model).__name__} and no tokenizer, so prompts cannot be read: "
            "give tokenizer=..., or the checkpoint folder instead of the module."
        )
    return load_tokenizer(Path(model))


def _find_neutral(
    given: Source | Sequence[Sequence[int]] | None, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Return the token ids of neutral prompts: given ones, those of a file, or built-in ones.

    Raises:
        ValueError, FileNotFoundError: fewer than two prompts, an empty prompt, or no such file.
    """
    if given is None or isinstance(given, (str, PathLike)):
        prompts = neutral_prompts(None if given is None else Path(given), tokenizer)
    else:
        prompts = [list(prompt) for prompt in given]
    where = f" in {given}" if isinstance(given, (str, PathLike)) else ""
    if len(prompts) < 2 or not all(prompts):
        raise ValueError(
            f"There are {len(prompts)} neutral prompts{where}, {sum(not p for p in prompts)} of "
            "them empty: give at least 2 with at least one token each."
        )
    return prompts


def _find_tasks(
    given: Source | Sequence[Record] | None, tokenizer: PreTrainedTokenizerBase, options: Options
) -> list[_Task]:
    """Return at most `max_records` records, evenly spread over the data; none if `given` is None.

    Raises:
        ValueError: a record without an answer, by its number.
    """
    if given is None:
        return []
    records = read_records(str(given)) if isinstance(given, (str, PathLike)) else list(given)
    count = min(options.max_records, len(records))
    tasks = []
    for i in sorted({i * len(records) // count for i in range(count)}):
        try:
            prompt, answer = split_first_answer(records[i], tokenizer)
        except ValueError as error:
            raise ValueError(
                f"Record {i + 1}: {error} Without records, neutral prompts alone are looked at."
            ) from None
        tokens = prompt[-_MOST_PROMPT_TOKENS:], answer[: options.max_tokens]
        tasks.append(_Task(i + 1, records[i], tokens))
    return tasks
