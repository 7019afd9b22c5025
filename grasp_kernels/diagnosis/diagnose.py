"""Base model and adapter -> Diagnosis -> its text.

The effect is measured at the tokens of the base model's own answers. So it shows the changes that
the adapter would make in these answers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from os.path import abspath
from typing import Any

import torch
from torch import nn

from grasp_kernels.data import (
    Record,
    check_neutral,
    neutral_prompts,
    read_records,
    split_first_answer,
)
from grasp_kernels.data.chat_template import Tokenizer
from grasp_kernels.diagnosis.answers import (
    CHANGED,
    Tokens,
    changed_answers,
    own_answers,
    told,
    verdict,
)
from grasp_kernels.diagnosis.effect import measure_effect
from grasp_kernels.diagnosis.pair import Pair, open_pair
from grasp_kernels.files import new_folder, whole_folder, write_json, write_text
from grasp_kernels.inert import inert
from grasp_kernels.models.checkpoint import find_checkpoint, load_tokenizer
from grasp_kernels.pages.markdown import answers_table, table, words
from grasp_kernels.pages.page import page
from grasp_kernels.version import __version__

Source = str | PathLike[str]

_EFFECT_TOKENS = 16  # tokens of the base model's own answer; the effect is measured on them
_MOST_PROMPT_TOKENS = 512  # of a training prompt: its last ones, at most
_TRAINING_PROMPTS = 8  # that are answered, evenly spread over the data
_LISTED = 10  # tokens at each end of a list
_CAUTION = "This does not prove that the adapter learned nothing else."
_MEANING = {
    "found": "On prompts unrelated to its task, this adapter does not answer as its base model "
    "does: read the answers below.",
    "weak": "On some prompts unrelated to its task, this adapter does not answer as its base model "
    "does: read the answers below.",
    "nothing": "None of its answers to prompts unrelated to its task is one that its base model "
    f"would hardly give. {_CAUTION}",
}


@dataclass(frozen=True)
class Diagnosis:
    """Verdict on an adapter, with its reasons and all numbers.

    Attributes:
        verdict: "found", "weak" or "nothing", from the adapter's own answers to neutral prompts,
            see `grasp_kernels.diagnosis.answers.verdict`.
        reasons: the reasons for the verdict, in sentences.
        numbers: answers of both models, effect on neutral prompts, versions; JSON-able.
    """

    verdict: str
    reasons: tuple[str, ...]
    numbers: dict[str, Any]

    def text(self) -> str:
        """Return the whole diagnosis as Markdown."""
        return diagnosis_text(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the content of diagnosis.json."""
        return {"verdict": self.verdict, "reasons": list(self.reasons), **self.numbers}

    def save(self, folder: str | PathLike[str]) -> None:
        """Write diagnosis.md, .html and .json to a new folder, whole or not at all.

        Raises:
            FileExistsError: the folder exists already.
        """
        text = f"{self.text()}\n"
        with whole_folder(new_folder(folder)) as partial:
            write_json(partial / "diagnosis.json", self.to_json())
            write_text(partial / "diagnosis.html", page(text))
            write_text(partial / "diagnosis.md", text)


def diagnose(
    model: nn.Module | Source,
    adapter: Source | None = None,
    *,
    tokenizer: Any = None,
    records: Source | Sequence[Record] | None = None,
    neutral: Source | Sequence[Sequence[int]] | None = None,
    dtype: str = "auto",
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: bool = False,
) -> Diagnosis:
    """Compare an adapter's answers with its base model's, on prompts unrelated to its task.

    No labels and no retraining are needed.

    Args:
        model: the base model, as a checkpoint folder, a hub name or a module; or a PeftModel whose
            active adapter is measured. A module is left as it was.
        adapter: adapter folder; None if `model` is a PeftModel.
        tokenizer: the tokenizer of the model; needed if `model` is a module.
        records: training data, a file or records; some of their prompts are answered, too.
        neutral: prompts that are unrelated to the training data, a file (see
            `grasp-kernels run --neutral`) or token ids; everyday questions if None.
        dtype: dtype of the weights, if the model is loaded here.
        max_new_tokens: tokens of an answer of either model, at most.
        batch_size: sequences in a forward pass.

    Raises:
        ValueError, TypeError, FileNotFoundError: an adapter, model or prompts that cannot be used.
    """
    if max_new_tokens < 1 or batch_size < 1:
        given = f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}"
        raise ValueError(f"{given}: give 1 or more.")
    name: str | None = None
    if not isinstance(model, nn.Module):
        name, model = str(model), find_checkpoint(model)
        tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
    elif tokenizer is None:
        raise ValueError(
            f"diagnose got a {type(model).__name__} and no tokenizer, so prompts cannot be read: "
            "give tokenizer=..., or the checkpoint folder instead of the module."
        )
    prompts = {
        "unrelated": _find_neutral(neutral, tokenizer),
        "training": _find_training(records, tokenizer),
    }
    size: dict[str, Any] = {"batch_size": batch_size, "n_tokens": max_new_tokens}
    with open_pair(model, adapter, dtype=dtype) as pair:
        said = base_answers(pair, tokenizer, prompts, **size, progress=progress)
        config = pair.base.config
        numbers = {
            "adapter": str(adapter or pair.model.active_adapters[0]),
            "model": {
                "given": name,
                "named": next(iter(pair.model.peft_config.values())).base_model_name_or_path,
                "type": config.model_type,
                "layers": config.get_text_config().num_hidden_layers,
            },
            "prompts": {kind: len(given) for kind, given in prompts.items()},
            **adapter_numbers(pair, tokenizer, said, **size, n_listed=_LISTED, progress=progress),
            "versions": {"grasp_kernels": __version__, "torch": torch.__version__},
        }
    numbers = json.loads(json.dumps(numbers, allow_nan=False))
    return Diagnosis(numbers["answers"]["verdict"], tuple(reasons(numbers)), numbers)


def base_answers(
    pair: Pair, tokenizer: Any, prompts: Mapping[str, Sequence[list[int]]], **size: Any
) -> dict[str, list[Tokens]]:
    """Return the prompts of each kind with the answers of the base model; `size` as `own_answers`.

    Args:
        prompts: token ids of "unrelated" prompts, and of "training" prompts.
    """
    return {
        kind: own_answers(pair, tokenizer, given, **size) if given else []
        for kind, given in prompts.items()
    }


@torch.no_grad()
def adapter_numbers(
    pair: Pair,
    tokenizer: Any,
    said: Mapping[str, list[Tokens]],
    *,
    n_listed: int,
    batch_size: int,
    **size: Any,
) -> dict[str, Any]:
    """Return the numbers of the active adapter, JSON-able.

    Args:
        said: as `base_answers` returns it.
        n_listed: tokens in each list.

    Returns:
        effect: as `measure_effect`, on the unrelated prompts; answers: the verdict, and the answers
        to each kind of prompts as `told` returns them.
    """
    own = [(prompt, answer[:_EFFECT_TOKENS]) for prompt, answer in said["unrelated"]]
    changed = {
        kind: changed_answers(pair, tokenizer, base, batch_size=batch_size, **size) if base else []
        for kind, base in said.items()
    }
    frame = [prompt for prompt, _ in said["unrelated"]]
    return {
        "effect": measure_effect(pair, tokenizer, own, n_tokens=n_listed, batch_size=batch_size),
        "answers": {
            "verdict": verdict(changed["unrelated"]),
            **{kind: told(answers, tokenizer, frame) for kind, answers in changed.items()},
        },
    }


def spread(total: int) -> list[int]:
    """Return the places of a few of `total` records, evenly spread over them."""
    count = min(_TRAINING_PROMPTS, total)
    return [i * total // count for i in range(count)]


def reasons(numbers: dict[str, Any]) -> list[str]:
    """Return the findings, one sentence each.

    The verdict rests on the adapter's own answers alone: no threshold on the other numbers carries
    over from one model to another.
    """
    answers = numbers["answers"]["unrelated"]
    changed = sum(one["changed"] for one in answers)
    found = [
        f"On {changed} of {len(answers)} neutral prompts the adapter's answer is at least a "
        f"thousand times as likely with the adapter as without ({CHANGED} nats); an eighth of the "
        "prompts (and at least two) is called found, fewer are called weak."
    ]
    if changed:
        found.append(
            "No number says whether a change is harmful, because another language or format "
            "changes answers as well: read the answers below."
        )
    return [
        *found,
        "The adapter changes the predictions for the base model's own answers to neutral prompts "
        f"by {numbers['effect']['divergence']:.3g} nats a token.",
    ]


def _find_neutral(given: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of neutral prompts: given ones, those of a file, or built-in ones."""
    if given is None or isinstance(given, (str, PathLike)):
        return neutral_prompts(given, tokenizer)
    if any(isinstance(prompt, str) for prompt in given):
        raise ValueError("The neutral prompts are texts: give lists of token ids, or a file.")
    prompts = [list(prompt) for prompt in given]
    check_neutral(prompts)
    return prompts


def _find_training(given: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Return token ids of a few prompts, evenly spread over the data; none if None."""
    if given is None:
        return []
    records = read_records(str(given)) if isinstance(given, (str, PathLike)) else list(given)
    prompts = []
    for i in spread(len(records)):
        try:
            prompt, _ = split_first_answer(records[i], tokenizer)
        except ValueError as error:
            raise ValueError(
                f"Record {i + 1}: {error} Leave the records out to use neutral prompts alone."
            ) from None
        prompts.append(prompt[-_MOST_PROMPT_TOKENS:])
    return prompts


def diagnosis_text(numbers: dict[str, Any]) -> str:
    """Return the whole text, in Markdown that reads well in a terminal too."""
    answers, ends = numbers["answers"], numbers["effect"]["tokens"]
    sections = [
        f"# Diagnosis of {inert(numbers['adapter'])}",
        f"**Verdict: {numbers['verdict']}.** {_MEANING[numbers['verdict']]}",
        "\n".join(f"- {inert(reason)}" for reason in numbers["reasons"]),
        "## What it says",
        answers_table({"the adapter": answers["unrelated"]}),
    ]
    if answers["training"]:
        sections += [
            "To prompts of the training data, where answers should change:",
            answers_table({"the adapter": answers["training"]}),
        ]
    sections += [
        "## Which tokens change",
        "The first tokens of answers to neutral prompts, by the change of their mean probability.",
        table(["raised", "lowered"], [[words(ends["up"]), words(ends["down"])]]),
        _settings(numbers),
    ]
    return "\n\n".join(sections)


def _settings(numbers: dict[str, Any]) -> str:
    model, prompts, versions = numbers["model"], numbers["prompts"], numbers["versions"]
    named, given = model["named"], model["given"]
    differ = ""
    if named and given and abspath(named) != abspath(given):  # equal names of the hub are equal
        names = f"The adapter names the base model {named!r}, and {given!r} was given."
        differ = f" {inert(names)}"
    return (
        f"Model {inert(model['type'])}, {model['layers']} blocks; {prompts['unrelated']} neutral "
        f"prompts, {prompts['training']} of the training data; grasp_kernels "
        f"{versions['grasp_kernels']}, torch {versions['torch']}.{differ}"
    )
