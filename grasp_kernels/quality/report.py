"""Rows -> tables in Markdown and a figure for each dish. Measures nothing.

Only reported seeds count, and only the chosen strengths: a row of a seed that strengths were tuned
on is left out, and so is one of a strength that was reported before others were tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp_kernels.quality.dishes import DISHES
from grasp_kernels.quality.harness import BASE, TUNING_SEEDS, Row, read_rows, read_strengths
from grasp_kernels.quality.methods import INFORMATION, METHODS
from grasp_kernels.quality.statistics import Estimate, estimate, paired
from grasp_kernels.quality.summary import by_method, by_seed, summary
from grasp_kernels.run.folder import write_text

_SCORES = (
    ("task", "task ↑"),
    ("drift", "drift ↓"),
    ("drift_probability", "P(drift) ↓"),
    ("conditional", "drift, trained cues ↓"),
    ("good_cue", "good cue ↑"),
    ("bad_cue", "bad cue ↑"),
    ("facts", "facts ↑"),
    ("movement", "movement ↓"),
    ("kl", "KL ↓"),
    ("seconds", "s"),
    ("peak_bytes", "peak GiB"),
)
_LEGEND = """\
Means over seeds with 95 % t intervals; Δ are differences to the naive fine-tune within a seed.
Information is what a method sees besides base model and training data. Strengths were chosen on
other seeds. Scores are explained in `grasp_kernels/quality/scores.py`."""

# What a method sees, as the colour of its point.
_COLOURS = dict(zip(INFORMATION, ("tab:blue", "tab:cyan", "tab:orange", "tab:red"), strict=True))


def write_report(output: str | Path) -> Path:
    """Write `report.md` and a figure for each dish into the folder of a run.

    Raises:
        FileNotFoundError: the folder has no rows.
    """
    output = Path(output)
    rows = reported_rows(output)
    if not rows:
        raise ValueError(
            f"{output} has rows of tuning seeds alone: run the seeds that are to be reported."
        )
    dishes: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        dishes.setdefault((row["dish"], row["size"]), []).append(row)
    parts = ["# Quality benchmark", _LEGEND, "## In short", *summary(dishes)]
    for (dish, size), own in dishes.items():
        figure = f"{dish}-{size}.png"
        draw(own, output / figure, title=f"{dish} ({size}): {DISHES[dish].what}")
        parts += [f"## {dish}, {size}: {DISHES[dish].what}", table(own), f"![]({figure})"]
        parts += _failures(own)
    path = output / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def reported_rows(output: str | Path) -> list[Row]:
    """The rows of a folder with the chosen strengths, on the seeds that are reported."""
    strengths = read_strengths(Path(output) / "strengths.json")
    return [r for r in read_rows(Path(output) / "rows.jsonl") if _is_reported(r, strengths)]


def _is_reported(row: Row, strengths: Mapping[str, Mapping[str, Any]]) -> bool:
    method = METHODS.get(row["method"])
    if row["seed"] in TUNING_SEEDS:
        return False
    if method is None or not method.is_tuned:
        return True
    chosen = strengths.get(f"{row['dish']}-{row['size']}", {})
    return row["strength"] == chosen.get(method.name, row["strength"])


def table(rows: Sequence[Row]) -> str:
    """The methods of one dish, one a line, with the paired differences of task and drift."""
    groups = by_method(row for row in rows if not row["failure"])
    naive = {part: by_seed(groups.get(("naive", None), []), part) for part in ("task", "drift")}
    parts = sorted({part for row in rows for part in row.get("parts", {})})
    header = ["method", "strength", "information", "seeds", *(title for _, title in _SCORES)]
    header += ["Δ task", "Δ drift", *parts]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for (name, strength), own in groups.items():
        information = METHODS[name].information if name in METHODS else "none"
        cells = [name, "" if strength is None else str(strength), information, str(len(own))]
        cells += [_cell(own, part) for part, _ in _SCORES]
        cells += [_signed(paired(by_seed(own, p), naive[p])) for p in ("task", "drift")]
        cells += [str(estimate([row["parts"][part] for row in own])) for part in parts]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Drift against task: a point for each method, a curve for the naive fine-tune ended early."""
    from matplotlib.figure import Figure

    from grasp_kernels.files import whole_file

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    points = {
        key: (_mean(own, "task"), _mean(own, "drift"))
        for key, own in by_method(row for row in rows if not row["failure"]).items()
    }
    stopped = sorted(key for key in points if key[0] == "early-stop")
    if stopped:  # a line between the two ends alone would claim what was not measured
        by_steps = [points[k] for k in ((BASE, None), *stopped, ("naive", None)) if k in points]
        axes.plot(*zip(*by_steps, strict=True), color="gray", marker=".", label="naive, by steps")
    for (name, strength), (task, drift) in points.items():
        if name in ("early-stop", BASE):
            continue
        colour = "black" if name == "naive" else _COLOURS[METHODS[name].information]
        axes.plot(task, drift, marker="o", color=colour, linestyle="")
        shown = name if strength is None else f"{name} {strength}"
        axes.annotate(shown, (task, drift), xytext=(4, 3), textcoords="offset points", fontsize=7)
    for information, colour in _COLOURS.items():
        axes.plot([], [], marker="o", color=colour, linestyle="", label=f"sees: {information}")
    axes.set(title=title, xlabel="task ↑", ylabel="drift ↓")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _mean(rows: Sequence[Row], part: str) -> float:
    return sum(row[part] for row in rows) / len(rows)


def _cell(rows: Sequence[Row], part: str) -> str:
    """Mean and interval; empty where something was not measured, such as memory."""
    values = [row[part] for row in rows]
    if any(value is None for value in values):
        return ""
    scale = 2**30 if part == "peak_bytes" else 1
    return str(estimate([value / scale for value in values]))


def _signed(difference: Estimate | None) -> str:
    return "" if difference is None else f"{'+' if difference.mean >= 0 else ''}{difference}"


def _failures(rows: Iterable[Row]) -> list[str]:
    failed = [
        f"- {row['method']} {row['strength']}, seed {row['seed']}: {row['failure']}"
        for row in rows
        if row["failure"]
    ]
    return ["Failed:", "\n".join(failed)] if failed else []
