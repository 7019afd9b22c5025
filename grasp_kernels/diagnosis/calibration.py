"""How far verdicts can be trusted: scores of adapters that are known to be contaminated or not.

A user with such adapters of models of their own can calibrate on them: `measure_case` for each,
then `auc`, `draw_calibration`, and thresholds to pass on by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from grasp_kernels.diagnosis.diagnose import Diagnosis, diagnose
from grasp_kernels.diagnosis.examination import Options
from grasp_kernels.diagnosis.verdict import carried, score
from grasp_kernels.effect.measure import FOUND, WEAK
from grasp_kernels.files import whole_file

# Label-free numbers that could decide: the one of the verdict first.
SCORES = {
    "shift": "all prompts change alike (the verdict)",
    "carried": "one direction carries it",
    "together": "neutral prompts move together",
    "divergence": "size of the effect on neutral prompts",
    "gap": "first value of the weights over its null",
}
_COLOURS = ("tab:red", "tab:purple", "tab:blue", "tab:green", "tab:gray")
_STYLES = ("-", ":")


@dataclass(frozen=True)
class Case:
    """An adapter whose truth is known; `kind` says in a word what is in it."""

    kind: str
    present: bool
    base: Path
    adapter: Path
    data: Path
    neutral: Path | None = None


def measure_case(case: Case, options: Options | None = None) -> dict[str, Any]:
    """One row: truth, verdict and every score of `SCORES`."""
    diagnosis = diagnose(
        case.base, case.adapter, records=case.data, neutral=case.neutral, options=options
    )
    return {
        "kind": case.kind,
        "present": case.present,
        "verdict": diagnosis.verdict,
        **_scores(diagnosis),
    }


def roc(scores: Sequence[float], present: Sequence[bool]) -> tuple[list[float], list[float]]:
    """Shares of absent and of present cases at or above each threshold, from (0, 0) to (1, 1).

    Raises:
        ValueError: not both kinds of cases.
    """
    positive, negative = sum(present), len(present) - sum(present)
    if not positive or not negative:
        raise ValueError(
            f"There are {positive} cases with a factor and {negative} without: give some of both."
        )
    pairs = list(zip(scores, present, strict=True))
    false, true = [0.0], [0.0]
    for threshold in sorted(set(scores), reverse=True):
        false.append(sum(s >= threshold and not p for s, p in pairs) / negative)
        true.append(sum(s >= threshold and p for s, p in pairs) / positive)
    return false, true


def auc(scores: Sequence[float], present: Sequence[bool]) -> float:
    """Area under the ROC: how often a case with a factor scores above one without."""
    false, true = roc(scores, present)
    return sum(
        (false[i + 1] - false[i]) * (true[i + 1] + true[i]) / 2 for i in range(len(false) - 1)
    )


def draw_calibration(rows: Sequence[dict[str, Any]], path: str | PathLike[str]) -> None:
    """Save a PNG: the score of every case by kind with both thresholds, and the ROC by kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_scores(left, rows)
    _draw_roc(right, rows)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _draw_scores(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for place, kind in enumerate(kinds):
        own = [row for row in rows if row["kind"] == kind]
        colour = "tab:red" if own[0]["present"] else "tab:blue"
        values = [row["shift"] for row in own]
        axes.plot(values, [place] * len(own), "o", color=colour, alpha=0.6)
    for value, style in ((FOUND, "-"), (WEAK, "--")):
        axes.axvline(value, color="gray", ls=style, lw=1)
    axes.set(
        yticks=range(len(kinds)),
        yticklabels=kinds,
        xlabel="part of the effect that is the same for all prompts",
        title="Every adapter (red: factor planted; lines: weak, found)",
    )
    axes.invert_yaxis()


def _draw_roc(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """One colour for each score, one style for each kind of factor; of many kinds, all at once."""
    absent = [row for row in rows if not row["present"]]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["present"]:
            kinds.setdefault(row["kind"], []).append(row)
    if len(kinds) > len(_STYLES):
        kinds = {"": [row for own in kinds.values() for row in own]}
    for (kind, planted), style in zip(kinds.items(), _STYLES, strict=False):
        cases = [*absent, *planted]
        for (name, what), colour in zip(SCORES.items(), _COLOURS, strict=True):
            scores, present = ([row[key] for row in cases] for key in (name, "present"))
            label = f"{kind}: {what}" if kind else what
            label += f", {auc(scores, present):.2f}"
            axes.plot(*roc(scores, present), style, color=colour, label=label)
    axes.plot([0, 1], [0, 1], color="gray", lw=0.8)
    axes.set(xlabel="false alarms", ylabel="found", title="ROC against all without (area below it)")
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _scores(diagnosis: Diagnosis) -> dict[str, float]:
    numbers = diagnosis.numbers
    spectra = numbers["weights"]["evidence"].get("spectra", [])
    flip = numbers["consistency"]["sign_flip"]
    return {
        "shift": numbers["effect"]["common_shift"],
        "carried": carried(numbers),
        "score": score(numbers),
        "together": flip["length"],
        "divergence": numbers["effect"]["neutral_divergence"],
        "gap": spectra[0]["singular_values"][0] / spectra[0]["null"][0] if spectra else 0.0,
        "removal": _of_movement(numbers, "removal"),
        "transfer": _of_movement(numbers, "transfer"),
    }


def _of_movement(numbers: dict[str, Any], what: str) -> float:
    return next(
        (one[what]["value"] for one in numbers["directions"] if one["name"] == "movement"), 0.0
    )
