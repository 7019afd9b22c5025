"""A diagnosis as JSON -> text in plain words."""

from os.path import abspath
from typing import Any

from grasp_kernels.inert import inert
from grasp_kernels.pages.markdown import answers_table, table, words

Numbers = dict[str, Any]

_CAUTION = "This does not prove that the adapter learned nothing else."
_MEANING = {
    "found": "On prompts unrelated to its task, this adapter does not answer as its base model "
    "does: read the answers below.",
    "weak": "On some prompts unrelated to its task, this adapter does not answer as its base model "
    "does: read the answers below.",
    "nothing": "None of its answers to prompts unrelated to its task is one that its base model "
    f"would hardly give. {_CAUTION}",
}


def diagnosis_text(numbers: Numbers) -> str:
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


def _settings(numbers: Numbers) -> str:
    model, prompts, versions = numbers["model"], numbers["prompts"], numbers["versions"]
    named, given = model["named"], model["given"]
    differ = ""
    if named and given and abspath(named) != abspath(given):  # equal names of the hub are equal
        differ = f" The adapter names the base model {named!r}, and {given!r} was given."
    return (
        f"Model {inert(model['type'])}, {model['layers']} blocks; {prompts['unrelated']} neutral "
        f"prompts, {prompts['training']} of the training data; grasp_kernels "
        f"{versions['grasp_kernels']}, torch {versions['torch']}.{inert(differ)}"
    )
