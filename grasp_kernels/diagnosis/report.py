"""A diagnosis as JSON -> text in plain words, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_kernels.effect.markdown import answers_table, cell, table
from grasp_kernels.files import whole_folder, write_json, write_text
from grasp_kernels.inert import inert

if TYPE_CHECKING:
    from grasp_kernels.diagnosis.diagnose import Diagnosis

Numbers = dict[str, Any]

_CAUTION = "That nothing was found does not prove that nothing is there."
_MEANING = {
    "found": "This adapter answers prompts that have nothing to do with its task in another way "
    "than its base model: read how, below.",
    "weak": "This adapter answers some prompts that have nothing to do with its task in another "
    "way than its base model: read how, below.",
    "nothing": "This adapter answers prompts that have nothing to do with its task as its base "
    f"model does. {_CAUTION}",
}


def save(diagnosis: Diagnosis, folder: Path) -> None:
    """Write diagnosis.md, diagnosis.json and diagnosis.png into a new folder."""
    if folder.exists():
        raise FileExistsError(f"There is a {folder} already: choose a new folder.")
    with whole_folder(folder) as partial:
        write_json(partial / "diagnosis.json", diagnosis.to_json())
        diagnosis.plot(partial / "diagnosis.png")
        write_text(partial / "diagnosis.md", f"{diagnosis.text()}\n\n![](diagnosis.png)\n")


def diagnosis_text(numbers: Numbers) -> str:
    """The whole text, in Markdown that reads well in a terminal too."""
    sections = [
        _verdict(numbers),
        "## What it says",
        answers_table({"the adapter": numbers["answers"]["unrelated"]}),
        _neutral(numbers),
        _directions(numbers),
        *(_examples(one) for one in numbers["directions"] if "examples" in one),
        _settings(numbers),
    ]
    return "\n\n".join(section for section in sections if section)


def _verdict(numbers: Numbers) -> str:
    meaning = _MEANING[numbers["verdict"]]
    return "\n\n".join(
        [
            f"# Diagnosis of {inert(numbers['adapter'])}",
            f"**Verdict: {numbers['verdict']}.** {meaning}",
            "\n".join(f"- {inert(reason)}" for reason in numbers["reasons"]),
        ]
    )


def _neutral(numbers: Numbers) -> str:
    shift = numbers["effect"]["neutral_tokens"]
    rows = [
        ["more likely with the adapter", _words(shift["up"], "+.3f")],
        ["less likely", _words(shift["down"], "+.3f")],
    ]
    return "\n\n".join(
        [
            "## How neutral prompts are answered",
            "Change of the mean probability of the first token of the answer.",
            table(["", "tokens"], rows),
        ]
    )


def _directions(numbers: Numbers) -> str:
    if not numbers["directions"]:
        return ""
    rows = [
        [
            one["name"],
            _share(one["removal"]),
            _share(one["transfer"]),
            f"{_relative(one):.1%}",
            _words(one["tokens"]["up"]),
            _words(one["tokens"]["down"]),
        ]
        for one in numbers["directions"]
    ]
    head = ["direction", "removal (random)", "transfer (random)", "movement", "raises", "lowers"]
    return "\n\n".join(
        [
            "## The directions",
            "`movement` is how neutral prompts move. Removal: part of the adapter's effect on "
            "neutral prompts that goes when its movement along the direction is taken out. "
            "Transfer: part of the way from the base model to the adapter that this movement alone "
            "goes. The largest of the random directions stands beside both. Movement: largest part "
            "of the stream's own length in a block. Tokens: read through the unembedding after the "
            "last block.",
            table(head, rows),
            _steering(numbers),
        ]
    )


def _steering(numbers: Numbers) -> str:
    rows = []
    for one in numbers["directions"]:
        steering = one["steering"]
        for i, tokens in enumerate(steering["tokens"]):
            answers = steering.get("answers")
            rows.append(
                [
                    one["name"],
                    str(steering["layer"]),
                    f"{tokens['dose']:+g}",
                    _beside_random(tokens, "+.3f"),
                    _beside_random(answers[i], "+.2f") if answers else "–",
                ]
            )
    head = ["direction", "block", "dose", "raised tokens", "training answers"]
    return "\n\n".join(
        [
            "Steering the base model, where dose 1 is the adapter's own movement in that block: "
            "change of the probability of the raised tokens on neutral prompts, and of the mean "
            "log probability of the training answers (mean of the random directions beside it).",
            table(head, rows),
        ]
    )


def _examples(direction: Numbers) -> str:
    rows = [
        [str(e["record"]), f"{e['movement']:+.3f}", cell(e["prompt"]), cell(e["answer"])]
        for e in direction["examples"]
    ]
    return "\n\n".join(
        [
            f"## Training records that move most along {direction['name']}",
            table(["record", "movement", "prompt", "answer"], rows),
        ]
    )


def _settings(numbers: Numbers) -> str:
    model, options = numbers["model"], numbers["options"]
    return (
        f"Model {inert(model['type'])}, {model['layers']} blocks of width {model['width']}; "
        f"{numbers['neutral_prompts']} neutral prompts, {numbers['records']} training records, "
        f"{options['n_random']} random directions, seed {numbers['seed']}; grasp_kernels "
        f"{numbers['versions']['grasp_kernels']}, torch {numbers['versions']['torch']}."
    )


def _relative(direction: Numbers) -> float:
    """Largest movement along a direction relative to the stream, over the blocks."""
    neutral = direction["neutral"]
    return max(
        size / length if length else 0.0
        for size, length in zip(neutral["size"], neutral["stream"], strict=True)
    )


def _share(part: Numbers) -> str:
    return f"{part['value']:.0%} ({part['random_max']:.0%})"


def _beside_random(row: Numbers, how: str) -> str:
    return f"{row['value']:{how}} ({row['random_mean']:{how}})"


def _words(tokens: list[Numbers], how: str | None = None) -> str:
    return " ".join(
        f"`{cell(token['token'])}`" + (f" {token['score']:{how}}" if how else "")
        for token in tokens
    )
