"""A diagnosis as JSON -> text in plain words, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_kernels.files import whole_folder, write_json, write_text
from grasp_kernels.inert import inert
from grasp_kernels.pages.markdown import answers_table, cell, table, words
from grasp_kernels.pages.page import page

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
    """Write diagnosis.md, diagnosis.html and diagnosis.json into a new folder."""
    if folder.exists():
        raise FileExistsError(f"There is a {folder} already: choose a new folder.")
    text = f"{diagnosis.text()}\n"
    with whole_folder(folder) as partial:
        write_json(partial / "diagnosis.json", diagnosis.to_json())
        write_text(partial / "diagnosis.html", page(text))
        write_text(partial / "diagnosis.md", text)


def diagnosis_text(numbers: Numbers) -> str:
    """Return the whole text, in Markdown that reads well in a terminal too."""
    sections = [
        f"# Diagnosis of {inert(numbers['adapter'])}",
        f"**Verdict: {numbers['verdict']}.** {_MEANING[numbers['verdict']]}",
        "\n".join(f"- {inert(reason)}" for reason in numbers["reasons"]),
        "## What it says",
        answers_table({"the adapter": numbers["answers"]["unrelated"]}),
        "## Which tokens change",
        "Where the answers to neutral prompts begin, by the change of their mean probability; and "
        "along the movement, read through the unembedding after the last block.",
        _tokens(numbers),
    ]
    if "movement" in numbers:
        sections += _movement(numbers["movement"])
    return "\n\n".join([*sections, _settings(numbers)])


def _tokens(numbers: Numbers) -> str:
    listed = {"first token of the answer": numbers["effect"]["tokens"]}
    if "movement" in numbers:
        listed["movement"] = numbers["movement"]["tokens"]
    rows = [[name, words(ends["up"]), words(ends["down"])] for name, ends in listed.items()]
    return table(["", "raised", "lowered"], rows)


def _movement(movement: Numbers) -> list[str]:
    row = [
        *(
            f"{movement[part]['value']:.0%} ({movement[part]['random_max']:.0%})"
            for part in ("removal", "transfer")
        ),
        f"{max(movement['relative'], key=abs):.1%}",
    ]
    sections = [
        "## How neutral prompts move",
        "Removal: part of the adapter's effect on neutral prompts that goes when their mean "
        "movement is taken out. Transfer: part of the way from the base model to the adapter that "
        "this movement alone goes. The largest of the random directions stands beside both. "
        "Movement: largest part of the stream's own length in a block.",
        table(["removal (random)", "transfer (random)", "movement"], [row]),
    ]
    if "records" in movement:
        rows = [
            [str(e["record"]), f"{e['movement']:+.3f}", cell(e["prompt"]), cell(e["answer"])]
            for e in movement["records"]
        ]
        sections += [
            "## Training records that move most along it",
            table(["record", "movement", "prompt", "answer"], rows),
        ]
    return sections


def _settings(numbers: Numbers) -> str:
    model, options = numbers["model"], numbers["options"]
    return (
        f"Model {inert(model['type'])}, {model['layers']} blocks; {numbers['neutral_prompts']} "
        f"neutral prompts, {numbers['records']} training records, {options['n_random']} random "
        f"directions, seed {numbers['seed']}; grasp_kernels "
        f"{numbers['versions']['grasp_kernels']}, torch {numbers['versions']['torch']}."
    )
