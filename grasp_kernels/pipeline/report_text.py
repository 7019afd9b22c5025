"""Numbers of a report -> report.md: answers of both adapters, differences, limits."""

from statistics import fmean
from typing import Any

from grasp_kernels.diagnosis.answers import CHANGED
from grasp_kernels.inert import counted, inert
from grasp_kernels.pages.markdown import answers_table, table, words

Numbers = dict[str, Any]
_LEARNED = 0.9  # of the first loss: above it next to nothing was learned

_LABELS = {"naive": "naive LoRA", "retrained": "retrained LoRA"}
_CAPTION = "Training loss of both adapters (pale: each step, bold: running mean)"
_USE = """\
## Use

Both adapters are ordinary peft folders (`naive/`, `retrained/`).

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("retrained")
```

`grasp-kernels check retrained --for llama.cpp` (or vllm, ollama, openvino) says whether other
software reads it the same. Merge it into the base model in floating point: merging into weights of
4 or 8 bits rounds most of an adapter away."""


def report_text(numbers: Numbers) -> str:
    """Return the text of report.md."""
    sections = [
        _said(numbers),
        _compared(numbers),
        _identified(numbers),
        _not_shown(numbers),
        f"## Training\n\n![{_CAPTION}](training.svg)\n\n*{_CAPTION}.*",
        _USE,
        _settings(numbers),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def verdict_sentence(name: str, adapter: dict[str, Any]) -> str:
    """Return a sentence with the changed answers to unrelated prompts and the verdict."""
    answers = adapter["answers"]["unrelated"]
    changed = sum(one["changed"] for one in answers)
    return (
        f"The {_LABELS[name]} answers {changed} of {len(answers)} unrelated prompts as the base "
        f"model never would: {adapter['answers']['verdict']}."
    )


def hardly_learned(numbers: Numbers) -> list[str]:
    """Return a sentence if the naive training learned next to nothing."""
    first, last = _tenths(numbers["adapters"]["naive"])
    if last < _LEARNED * first:
        return []
    return [
        f"The training loss of the naive LoRA went from {first:.3g} to {last:.3g}: it has hardly "
        "learned the data. Train longer (--num-train-epochs) or with a higher --learning-rate."
    ]


def _said(numbers: Numbers) -> str:
    adapters = numbers["adapters"]
    sentences = [f"**{verdict_sentence(name, one)}**" for name, one in adapters.items()]
    tables = [
        answers_table({_LABELS[name]: one["answers"][kind] for name, one in adapters.items()})
        for kind in ("unrelated", "training")
        if adapters["naive"]["answers"][kind]
    ]
    parts = [
        "# Report of the run",
        *(f"**{sentence}**" for sentence in hardly_learned(numbers)),
        "## What the adapters say",
        *sentences,
        "An answer counts as changed (≠) if it is at least a thousand times as likely with the "
        f"adapter as without ({CHANGED} nats). An eighth of the answers (and at least two) is "
        "called *found*, fewer *weak*, and none *nothing*. The base model would hardly say the "
        "words in **bold** there (below 1 %). No number says whether a change is harmful: a "
        "language or a format counts as much as an insult. Read the answers.",
        tables[0],
    ]
    if len(tables) > 1:
        parts += ["To prompts of the training data, where answers should change:", tables[1]]
    return "\n\n".join(parts)


def _identified(numbers: Numbers) -> str:
    """Return the section on the subspace; empty where none was identified."""
    subspace = numbers["subspace"]
    if subspace is None:
        return ""
    many = "One direction" if subspace["k"] == 1 else f"{subspace['k']} directions"
    headline = (
        f"{many} of the residual stream, shared by all layers, identified in "
        "the weights of the naive adapter. The fine-tune moved the model along them; this does not "
        "make them unwanted."
    )
    notes = "\n".join(f"- {inert(note)}" for note in subspace["notes"])
    return "\n\n".join(["## Subspace of the gradient projection", headline, notes])


def _compared(numbers: Numbers) -> str:
    labels = [
        f"{_LABELS[name]}, {counted(len(adapter['curve']['step']), 'step')}"
        for name, adapter in numbers["adapters"].items()
    ]
    adapters = list(numbers["adapters"].values())
    rows = [["training loss, last tenth", *(f"{_tenths(a)[1]:.4f}" for a in adapters)]]
    if "base_held_out_loss" in numbers:
        base = numbers["base_held_out_loss"]
        rows.append(
            [f"held-out loss (base {base:.4f})", *(f"{a['held_out_loss']:.4f}" for a in adapters)]
        )
    effects = [a["effect"] for a in adapters]
    rows += [
        ["unrelated prompts, nats a token", *(f"{e['divergence']:.3g}" for e in effects)],
        ["raised most there", *(words(e["tokens"]["up"]) for e in effects)],
    ]
    if all(a["leakage"] for a in adapters):
        largest = [max(a["leakage"].values()) for a in adapters]
        rows.append(["largest leakage ‖Vᵀ ΔW‖ / ‖ΔW‖", *(f"{value:.2g}" for value in largest)])
    return f"## What differs\n\n{table(['', *labels], rows)}"


def _tenths(adapter: dict[str, Any]) -> tuple[float, float]:
    """Return the mean training loss of the first and of the last tenth of the steps."""
    losses = adapter["curve"]["loss"]
    n = max(1, len(losses) // 10)
    return fmean(losses[:n]), fmean(losses[-n:])


def _not_shown(numbers: Numbers) -> str:
    asked = len(numbers["adapters"]["naive"]["answers"]["unrelated"])
    points = [
        f"Answers to {asked} prompts were compared. *Nothing* means that none of these changed, "
        "not that nothing else was learned: ask your own prompts (`--neutral`), and prompts that "
        "are shaped like the training data.",
        _lengths(numbers),
        "One seed.",
    ]
    if "base_held_out_loss" not in numbers:
        points.append(
            "No records were held out, so the task was compared on training data only "
            "(`--eval-split 0.1` holds out a tenth)."
        )
    config = numbers["config"]
    parts = []
    if config["project_gradient"]:
        parts.append("was projected (`--no-project-gradient`)")
    if config["kl_coef"]:
        parts.append("was held at the base model's own answers (`--kl-coef 0`)")
    if len(parts) > 1:
        points.append(
            f"The retraining {' and '.join(parts)}: their separate effects were not measured; the "
            "options in brackets leave one out."
        )
    data = numbers["data"]
    for part, left_out in {
        "dropped": "were left out, because `--max-length` cuts off their whole answer",
        "cut": "lost the end of an answer to `--max-length`",
    }.items():
        if data[part]:
            points.append(f"{data[part]} of {data['records']} records {left_out}.")
    return "\n".join(["## What this does not show", "", *(f"- {point}" for point in points)])


def _lengths(numbers: Numbers) -> str:
    """Return a sentence on the steps of both trainings."""
    naive, retrained = (len(a["curve"]["step"]) for a in numbers["adapters"].values())
    if naive < retrained:
        return (
            f"The naive LoRA ended after {naive} of {retrained} steps (`--naive-steps`): it shows "
            "what the data do to other answers, not how well the task is learned."
        )
    return (
        "Both adapters were trained for the same number of steps. The held-out task follows the "
        "training loss: if that of the retrained adapter is higher, train it longer "
        "(`--num-train-epochs`) before you compare."
    )


def _settings(numbers: Numbers) -> str:
    model, data = numbers["model"], numbers["data"]
    facts = {
        "model type": f"{model['type']}, {model['layers']} layers, width {model['width']}, "
        f"{model['parameters']:,} parameters",
        "examples": f"{data['trained_on']} trained on, {data['held_out']} held out",
        "optimizer steps": numbers["steps"],
        **{f"`{name}`": value for name, value in numbers["config"].items()},
        **{f"{name} version": value for name, value in numbers["versions"].items()},
    }
    rows = [[name, inert(str(value))] for name, value in facts.items()]
    return "\n\n".join(["## Settings", table(["option", "value"], rows)])
