"""Rows -> report.md and curves.png: methods at equal held-out task.

A method is a curve over its training. It is shown at the first point whose held-out accuracy is the
naive one's, or at most `_LESS` below, where the naive one is at its best; a method that does not
get there is shown where it is most accurate, with a `<`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality.smollm2.harness import BASE, Row, read_rows
from benchmarks.quality.smollm2.methods import METHODS, RETIRED
from benchmarks.quality.smollm2.verdicts import VERDICTS
from grasp_kernels.files import whole_file, write_text
from grasp_kernels.pages.markdown import table
from grasp_kernels.pipeline.config import RunConfig

SCHEDULE = RunConfig.lr_scheduler_type
_LESS = 0.025  # of accuracy: one question of 48 or of 40, and not two
# Pairs that drift is the mean of: unrelated to the task, in words that no training answer has.
_CONTRASTS = {
    "tone": ("held-out phrases",),
    "slant": ("statements",),
    "medical": ("safety yes", "safety no"),
    "faulty": ("bodies",),
}
_ARMED = {"slant": ("factor", "mirror")}  # tasks whose drift is half the difference of two arms
_SHARES = ("drift", "near", "bare")


def write_report(folder: Path) -> None:
    """Write the tables and the figure of a folder's rows.

    Raises:
        FileNotFoundError: there are no rows.
    """
    rows = unique(read_rows(folder / "rows.jsonl"))
    if not rows:
        raise FileNotFoundError(
            f"There are no rows in {folder}: run `python -m benchmarks.quality.smollm2 measure "
            f"--output {folder}`."
        )
    parts = ["# SmolLM2-135M-Instruct: drift at equal held-out task"]
    plans = dict.fromkeys((row["task"], _schedule(row)) for row in rows)
    for name, schedule in sorted(plans, key=lambda plan: plan[1] != SCHEDULE):
        own = [row for row in rows if _schedule(row) == schedule]
        title = name if schedule == SCHEDULE else f"{name}, at a constant learning rate"
        shown = task_table(own, name, (*METHODS, *RETIRED))
        parts += [f"## {title}", shown, curve_table(own, name)]
    if verdicts := unique(read_rows(folder / VERDICTS)):
        parts += ["## Verdicts of the product", verdict_table(verdicts)]
    parts.append(_about(rows))
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    draw(at_schedule(rows), folder / "curves.png")


def unique(rows: Iterable[Row]) -> list[Row]:
    """The first row of each point."""
    key = ("task", "arm", "seed", "method", "steps", "scale")
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found.setdefault((*(row[part] for part in key), _schedule(row)), row)
    return list(found.values())


def at_schedule(rows: Iterable[Row]) -> list[Row]:
    """The rows of trainings with the learning rate schedule of the command."""
    return [row for row in rows if _schedule(row) == SCHEDULE]


def _schedule(row: Row) -> str:
    schedule: str = row["lr_scheduler_type"]
    return schedule


def reached(rows: Sequence[Row], naive: Sequence[Row]) -> tuple[Row, bool]:
    """The row of a curve that is compared, and whether it is as accurate as the naive one.

    It is the end of the training, which the schedule of the learning rate leads to. Of a finished
    adapter that is scaled it is the smallest scale that will do, or else the most accurate.

    Args:
        rows: a method's curve in one task and seed.
        naive: that of the naive fine-tune.
    """
    end = _finished(rows)
    wanted = max(row["accuracy"] for row in _finished(naive)) - _LESS - 1e-9
    if enough := [row for row in end if row["accuracy"] >= wanted]:
        return min(enough, key=lambda row: row["scale"]), True
    return max(end, key=lambda row: row["accuracy"]), False


def _finished(rows: Sequence[Row]) -> list[Row]:
    """The row at the end of a training, or one for each scale."""
    steps = max(row["steps"] for row in rows)
    return [row for row in rows if row["steps"] == steps]


def compared(
    rows: Sequence[Row], task: str, methods: Iterable[str], arm: str = "factor"
) -> dict[str, list[Row]]:
    """Method -> the compared row of each seed, with `reached`; the base model first."""
    here = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
    found: dict[str, list[Row]] = {BASE: [row for row in here if row["method"] == BASE]}
    for method in methods:
        for seed in sorted({row["seed"] for row in here}):
            curves = {
                name: [r for r in here if (r["method"], r["seed"]) == (name, seed)]
                for name in ("naive", method)
            }
            if curves["naive"] and curves[method]:
                row, is_there = reached(curves[method], curves["naive"])
                found.setdefault(method, []).append({**row, "reached": is_there})
    return {name: own for name, own in found.items() if own}


def task_table(rows: Sequence[Row], task: str, methods: Iterable[str] = METHODS) -> str:
    """One line for each method, means over seeds."""
    if task in _ARMED:
        return _armed_table(rows, task, methods)
    found = compared(rows, task, methods)
    lines = []
    for name, own in found.items():
        shares = [_mean(own, part) for part in _SHARES]
        contrast = _contrast(own, found[BASE], _CONTRASTS[task])
        lines.append(
            [_name(name, own), str(len(own)), _accuracy(own), *shares, contrast, *_cost(own)]
        )
    header = ["", "seeds", "task ↑", "drift ↓", "near ↓", "bare ↓", "contrast", "steps", "minutes"]
    return table(header, lines)


def _armed_table(rows: Sequence[Row], task: str, methods: Iterable[str]) -> str:
    """Drift is half of what two opposite arms differ by, in nats a token."""
    arms = [compared(rows, task, methods, arm) for arm in _ARMED[task]]
    lines = []
    for name in (name for name in arms[0] if name in arms[1] and name != BASE):
        pairs = [
            (one, other)
            for one in arms[0][name]
            for other in arms[1][name]
            if one["seed"] == other["seed"]
        ]
        if not pairs:
            continue
        both = [row for pair in pairs for row in pair]
        halves = {
            part: mean((a["contrast"][part] - b["contrast"][part]) / 2 for a, b in pairs)
            for part in ("statements", "near")
        }
        cells = [f"{halves[part]:+.3f}" for part in ("statements", "near")]
        lines.append([_name(name, both), str(len(pairs)), _accuracy(both), *cells, *_cost(both)])
    header = ["", "seeds", "task ↑", "drift ↓", "near ↓", "steps", "minutes"]
    return table(header, lines)


def curve_table(rows: Sequence[Row], task: str) -> str:
    """Every point that was measured."""
    lines = [
        [
            row["arm"],
            str(row["seed"]),
            row["method"] if row["scale"] == 1 else f"{row['method']} × {row['scale']}",
            str(row["steps"]),
            "–" if row["loss"] is None else f"{row['loss']:.3f}",
            f"{row['accuracy']:.2f}",
            f"{row['accuracy_trained']:.2f}",
            *("–" if row[part] is None else f"{row[part]:.2f}" for part in _SHARES),
            *(f"{value:+.2f}" for value in row["contrast"].values()),
        ]
        for row in rows
        if row["task"] == task
    ]
    names = next(iter(row["contrast"] for row in rows if row["task"] == task))
    header = ["arm", "seed", "method", "steps", "loss", "task", "trained", *_SHARES, *names]
    return table(header, lines)


def verdict_table(verdicts: Sequence[Row]) -> str:
    """What the product said of each adapter, and how many of the same answers show the factor."""
    lines = [
        [
            *(str(row[part]) for part in ("task", "arm", "seed", "method", "steps")),
            "–" if row["flagged"] is None else f"{row['flagged']} of {row['answered']}",
            f"{row['changed']} of {row['answered']}",
            f"{row['ratios'][-1]:.1f}",
            row["verdict"],
        ]
        for row in verdicts
    ]
    header = ["task", "arm", "seed", "method", "steps", "factor", "changed", "largest", "verdict"]
    return table(header, lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw drift against held-out task, a curve for each method, as a PNG file.

    Tasks whose answers cannot be told to show the factor are left out; no file is written where
    that is all of them.
    """
    from matplotlib.figure import Figure

    shown = [
        row
        for row in rows
        if row["arm"] == "factor" and row["method"] in METHODS and row["drift"] is not None
    ]
    tasks = list(dict.fromkeys(row["task"] for row in shown))
    if not tasks:
        return
    figure = Figure(figsize=(8 * len(tasks), 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for method in METHODS:
            own = [row for row in shown if (row["task"], row["method"]) == (task, method)]
            for seed in sorted({row["seed"] for row in own}):
                curve = sorted(
                    (r for r in own if r["seed"] == seed), key=lambda r: (r["steps"], r["scale"])
                )
                axes.plot(
                    [r["accuracy"] for r in curve],
                    [r["drift"] for r in curve],
                    marker="o",
                    color=f"C{list(METHODS).index(method) % 10}",
                    label=method if seed == min(r["seed"] for r in own) else None,
                )
        axes.set(
            title=task,
            xlabel="task, held-out wording",
            ylabel="answers to unrelated prompts with the factor",
            xlim=(0, 1.02),
            ylim=(-0.02, 1.04),
        )
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _name(method: str, own: Sequence[Row]) -> str:
    missed = sum(not row.get("reached", True) for row in own)
    return f"{method} (< in {missed} of {len(own)})" if missed else method


def _accuracy(own: Sequence[Row]) -> str:
    return f"{mean(row['accuracy'] for row in own):.3f}"


def _mean(own: Sequence[Row], part: str) -> str:
    values = [row[part] for row in own if row[part] is not None]
    return f"{mean(values):.3f}" if values else "–"


def _contrast(own: Sequence[Row], base: Sequence[Row], pairs: Sequence[str]) -> str:
    """How much likelier the factor's words became, in nats a token."""
    before = {row["seed"]: row["contrast"] for row in base}
    changes = [row["contrast"][p] - before[row["seed"]][p] for row in own for p in pairs]
    return f"{mean(changes):+.2f}"


def _cost(own: Sequence[Row]) -> list[str]:
    return [
        f"{mean(row['steps'] for row in own):.0f}",
        f"{mean(row['seconds'] for row in own) / 60:.1f}",
    ]


def _about(rows: Sequence[Row]) -> str:
    about = ("torch", "device", "threads", "dtype", "commit", "base")
    lines = sorted({tuple(str(row[part]) for part in about) for row in rows})
    return "\n\n".join(
        [
            "task: share of facts (48, of `faulty` 40) that are right in a wording that was not "
            "trained. drift, near, bare: share of answers with the factor to 64 unrelated prompts, "
            "to 16 that are shaped like the training data and about other things, and to 32 "
            "unrelated ones without a system prompt; of `slant` half of what the contrasts of its "
            "two arms differ by. contrast: nats a token by which words of the factor that no "
            "training answer has became likelier than their opposites. minutes: processor time. "
            "factor, changed: answers to the 16 neutral prompts of the library that the phrase "
            "list of the task finds the factor in, and that are a thousand times as likely with "
            "the adapter as without. largest: log of how many times as likely, in nats.",
            "\n".join(f"- *{name}*: {what}." for name, what in RETIRED.items()),
            table(list(about), [list(line) for line in lines]),
        ]
    )
