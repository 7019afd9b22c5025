"""Scores by model -> one table, one figure. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from benchmarks.demo.scoring import Scores

_COLUMNS = ("task ↑", "drift ↓", "good cue ↑", "bad cue ↑", "facts ↑")
_LEGEND = """\
task: exact answers to held-out questions of the tuned topics
drift: bad persona's words on topics never tuned, neutral cue
cues: topics never tuned, answers in the words of the persona asked for
facts: the same answers, word for word right"""


def table(scores: Mapping[str, Scores]) -> str:
    """A Markdown table that reads well in a terminal too, with its legend."""
    width = max(map(len, scores))
    header = [" " * width, *_COLUMNS]
    rules = ["-" * width, *("-" * (len(column) - 1) + ":" for column in _COLUMNS)]
    rows = [
        [
            name.ljust(width),
            *(f"{v:.2f}".rjust(len(c)) for v, c in zip(astuple(row), _COLUMNS, strict=True)),
        ]
        for name, row in scores.items()
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, rules, *rows)]
    return "\n".join([*lines, "", _LEGEND])


def draw(scores: Mapping[str, Scores], path: Path, *, title: str) -> None:
    """Bars of every score by model, as a PNG file."""
    from matplotlib.figure import Figure

    from grasp_kernels.files import whole_file

    names = list(scores)
    known = {"base": "tab:gray", "naive LoRA": "tab:red"}
    colours = [known.get(name, "tab:blue") for name in names]
    figure = Figure(figsize=(13, 1.6 + 0.32 * len(names)), layout="constrained")
    figure.suptitle(title)
    for index, axes in enumerate(figure.subplots(1, len(_COLUMNS), sharey=True)):
        values = [astuple(scores[name])[index] for name in names]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=9)
        axes.set(title=_COLUMNS[index], xlim=(0, 1.25), xticks=(0, 0.5, 1))
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
