"""Numbers of a report -> report.md: what was found, how sure that is, what was prevented."""

from __future__ import annotations

from statistics import median
from typing import Any

from grasp_kernels.effect import common_verdict
from grasp_kernels.effect.measure import FOUND, NOTICEABLE, WEAK
from grasp_kernels.run.markdown import cell, table

Numbers = dict[str, Any]

_LABELS = {"naive": "naive LoRA", "grasp": "GRASP"}
_HOW_SURE = {
    "found": (
        "The evidence passed every test that this tool makes. They show that the fine-tune moved "
        "the model along common directions, not that these are unwanted: look at the tokens "
        "below, and compare both adapters on prompts of your own."
    ),
    "weak": (
        "The evidence is **not convincing**: at least one test failed (see the reasons above). The "
        "retraining was done with these directions all the same. Take its adapter as an "
        "experiment, and trust it only if it does better on prompts of your own."
    ),
    "nothing": (
        "No direction stood out, so **nothing was projected**: a guess would only cost the task. "
        "That nothing was found does not prove that nothing is there."
    ),
}
_CAPTIONS = {
    "training.png": "Training loss of both adapters (pale: each step, bold: running mean)",
    "leakage.png": "Part of each adapter's own weights that lies in the subspace",
    "movement.png": "How far each adapter moves the residual stream along the subspace",
    "subspace.png": "Spectrum with the chosen k and its null, and the agreement across layers",
    "subspace-weights.png": "The subspace of the naive adapter's weights",
    "subspace-self-contrast.png": "The subspace of the self-contrast",
}


def report_text(numbers: Numbers) -> str:
    """The whole report.md."""
    sections = [
        _found(numbers),
        _prevented(numbers),
        _tokens(numbers),
        _not_shown(numbers),
        _figures(numbers),
        _use(numbers),
        _settings(numbers),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _found(numbers: Numbers) -> str:
    subspace = numbers["subspace"]
    source = {
        "weights": "the weights of the naive adapter",
        "self-contrast": "the base model's own answers against the training answers",
        "both": "the naive adapter's weights and the base model's own answers",
    }[numbers["config"]["identify"]]
    where = {"shared": "shared by all layers", "layer": "chosen for every layer on its own"}
    if subspace["verdict"] == "nothing":
        headline = f"**Verdict: nothing.** No direction stands out in {source}."
    else:
        headline = (
            f"**Verdict: {subspace['verdict']}.** {_directions(subspace['k'])} of the residual "
            f"stream, {where[subspace['scope']]}, found from {source}."
        )
    reasons = "\n".join(f"- {reason}" for reason in subspace["reasons"])
    return "\n\n".join(
        [
            "# GRASP run",
            "## What was found",
            headline,
            reasons,
            "## How sure that is",
            _HOW_SURE[subspace["verdict"]] + _retrained_without(numbers),
        ]
    )


def _retrained_without(numbers: Numbers) -> str:
    """What was done where nothing was found."""
    if numbers["subspace"]["verdict"] != "nothing":
        return ""
    if "grasp" in numbers["adapters"]:
        return (
            " The GRASP adapter differs from the naive one in where it reads, or in being held at "
            "the base model, which need no direction."
        )
    return " **No GRASP adapter was trained**, and the naive one stands as it is."


def _directions(k: int) -> str:
    return "One direction" if k == 1 else f"Up to {k} directions"


def _prevented(numbers: Numbers) -> str:
    adapters = numbers["adapters"]
    lines = ["## What was prevented"]
    if "grasp" not in adapters:
        lines.append("Nothing: there is no GRASP adapter.")
    else:
        lines.append(_effect_sentence(numbers))
        if "movement" in adapters["grasp"]:
            lines.append(_movement_sentence(numbers))
    if numbers["reads"]:
        lines.append(_reads_sentence(numbers["reads"]))
    lines.append(table(["", *(_LABELS[name] for name in adapters)], _rows(numbers)))
    if "movement" in adapters["naive"]:
        lines.append(
            f"A random subspace of this size would hold {numbers['chance_share']:.1%} of a "
            "movement in a random direction. Leakage is the largest over all modules."
        )
    return "\n\n".join(lines)


def _effect_sentence(numbers: Numbers) -> str:
    naive, grasp = (numbers["adapters"][name]["effect"] for name in ("naive", "grasp"))
    return (
        f"The naive adapter changes the base model's own answers to neutral prompts by "
        f"{naive['neutral_divergence']:.3g} nats a token, {alike(naive)}; the GRASP adapter by "
        f"{grasp['neutral_divergence']:.3g}, {alike(grasp)}. From {FOUND:.0%} on that counts "
        f"as found, below {WEAK:.0%} as nothing (calibrated on small models only)."
    )


def alike(effect: dict[str, Any]) -> str:
    """How much of the change of half of the prompts the mean change of the others explains."""
    verdict = common_verdict(effect)
    return f"{max(0.0, effect['common_shift']):.0%} of it for all prompts alike ({verdict})"


def _movement_sentence(numbers: Numbers) -> str:
    adapters = numbers["adapters"]
    naive, grasp = (adapters[name]["movement"]["neutral"] for name in ("naive", "grasp"))
    before, after = naive["mean_along"], grasp["mean_along"]
    if after >= before:
        comparison = "**not less: the retraining did not prevent it**"
    elif after == 0:
        comparison = "not at all"
    else:
        comparison = f"{before / after:.1f} times less"
    return (
        f"On neutral prompts the naive adapter moves the residual stream by {before:.3g} along the "
        f"subspace ({naive['share']:.1%} of its whole movement), the GRASP adapter by {after:.3g} "
        f"({grasp['share']:.1%}): {comparison}."
    )


def _reads_sentence(reads: dict[str, list[float]]) -> str:
    ratios = [ratio for found in reads.values() for ratio in found]
    return (
        f"The GRASP adapter reads along {len(ratios)} fixed directions in {len(reads)} layers, "
        f"where training text has {median(ratios):.3g} times the mean square of text that the base "
        f"model makes up (median; {min(ratios):.3g} to {max(ratios):.3g}). About 1 would mean that "
        "the two texts cannot be told apart, and that the adapter acts on other prompts as well."
    )


def _rows(numbers: Numbers) -> list[list[str]]:
    adapters = list(numbers["adapters"].values())
    rows = [["training loss, last tenth", *(f"{_final_loss(a):.4f}" for a in adapters)]]
    if "base_held_out_loss" in numbers:
        base = numbers["base_held_out_loss"]
        rows.append(
            [f"held-out loss (base {base:.4f})", *(f"{a['held_out_loss']:.4f}" for a in adapters)]
        )
    effects = [a["effect"] for a in adapters]
    rows += [
        ["neutral prompts, nats a token", *(f"{e['neutral_divergence']:.3g}" for e in effects)],
        ["another first choice", *(f"{e['neutral_changed']:.0%}" for e in effects)],
        ["raised most there", *(_raised(e) for e in effects)],
    ]
    for kind in ("training", "neutral"):
        if all("movement" in a for a in adapters):
            moved = [a["movement"][kind] for a in adapters]
            cells = [f"{m['mean_along']:.3g} ({m['share']:.1%})" for m in moved]
            rows.append([f"movement along the subspace (share), {kind} prompts", *cells])
    for side, formula in (("write", "‖Vᵀ ΔW‖ / ‖ΔW‖"), ("read", "‖ΔW U‖ / ‖ΔW‖")):
        largest = [_largest_leakage(a, side) for a in adapters]
        if any(value is not None for value in largest):
            cells = ["–" if value is None else f"{value:.2g}" for value in largest]
            rows.append([f"leakage {formula}", *cells])
    return rows


def _raised(effect: dict[str, Any]) -> str:
    if effect["neutral_divergence"] < NOTICEABLE:
        return "–"
    return _words([one["token"] for one in effect["neutral_tokens"]["up"]])


def _final_loss(adapter: dict[str, Any]) -> float:
    losses = adapter["curve"]["loss"]
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _largest_leakage(adapter: dict[str, Any], side: str) -> float | None:
    values = [v[side] for v in adapter["leakage"].values() if v[side] is not None]
    return max(values, default=None)


def _tokens(numbers: Numbers) -> str:
    if not numbers["promoted_tokens"]:
        return ""
    rows = [
        [str(i), _words(tokens["one_end"]), _words(tokens["other_end"])]
        for i, tokens in enumerate(numbers["promoted_tokens"], start=1)
    ]
    return "\n\n".join(
        [
            "## What the directions speak of",
            "Tokens at both ends of each direction, read through the unembedding in the last "
            "layer. Which end is which is arbitrary, and a direction may matter long before it "
            "reaches a token.",
            table(["direction", "one end", "other end"], rows),
        ]
    )


def _words(tokens: list[str]) -> str:
    return " ".join(f"`{cell(token)}`" for token in tokens)


def _not_shown(numbers: Numbers) -> str:
    points = [
        "No answer of the adapters was judged: whether the model behaves better is not measured "
        "here. Ask both adapters the same questions, close to the training data and far from it.",
        "The thresholds of the verdict come from small models with a planted factor. They are not "
        "validated on large ones.",
        "One seed: another one may find other directions.",
    ]
    if "base_held_out_loss" not in numbers:
        points.append(
            "No records were held out, so the task was compared on training data only "
            "(`--eval-split 0.1` holds out a tenth)."
        )
    if numbers["config"]["project"] == "weights" and "grasp" in numbers["adapters"]:
        points.append(
            "With `--project weights` only the adapter's own weights keep out of the subspace; "
            "what they write can still reach it through the frozen weights."
        )
    config = numbers["config"]
    beside = []
    if config["reads"] != "free":
        beside.append("read along fixed directions alone (`--reads free` leaves that out)")
    if config["anchor"] != "none":
        beside.append(
            "was held at the base model on text that the base model made up (`--anchor none`)"
        )
    if beside and "grasp" in numbers["adapters"]:
        points.append(
            f"The retraining also {' and '.join(beside)}: what the projection alone would do is "
            "not told apart here."
        )
    if numbers["data"]["dropped"]:
        points.append(
            f"{numbers['data']['dropped']} of {numbers['data']['records']} records were left out: "
            "`--max-length` cuts their whole answer away."
        )
    return "\n".join(["## What this does not show", "", *(f"- {point}" for point in points)])


def _figures(numbers: Numbers) -> str:
    images = [f"![{_CAPTIONS[n]}](figures/{n})\n\n*{_CAPTIONS[n]}.*" for n in numbers["figures"]]
    return "\n\n".join(["## Figures", *images])


def _use(numbers: Numbers) -> str:
    name = "grasp" if "grasp" in numbers["adapters"] else "naive"
    return "\n".join(
        [
            "## Use",
            "",
            "Both adapters are ordinary peft folders (`naive/`, `grasp/`)."
            if name == "grasp"
            else "The adapter is an ordinary peft folder (`naive/`).",
            "",
            "```python",
            "from peft import AutoPeftModelForCausalLM",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
            "```",
        ]
    )


def _settings(numbers: Numbers) -> str:
    model, data = numbers["model"], numbers["data"]
    facts = {
        "model type": f"{model['type']}, {model['layers']} layers, width {model['width']}, "
        f"{model['parameters']:,} parameters",
        "records": f"{data['trained_on']} trained on, {data['held_out']} held out",
        "optimizer steps": numbers["steps"],
        **{f"`{name}`": value for name, value in numbers["config"].items()},
        **{f"{name} version": value for name, value in numbers["versions"].items()},
    }
    rows = [[name, str(value).replace("|", "¦")] for name, value in facts.items()]
    return "\n\n".join(["## Settings", table(["option", "value"], rows)])
