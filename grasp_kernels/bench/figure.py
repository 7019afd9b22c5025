"""One figure from rows: how far each provider is from the floor.

Shapes: T tokens, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from grasp_kernels.bench.report import Lines, Name, lines_of
from grasp_kernels.bench.rows import Row
from grasp_kernels.bench.shapes import LINEARS
from grasp_kernels.files import whole_file

_COLUMNS = 2
_MOST_PANELS = 24  # more are no figure

_Panel = dict[str, dict[int, float]]  # provider -> T -> ratio to the floor


def plot(rows: list[Row], path: str | PathLike[str]) -> None:
    """Save a PNG: a panel a case, a bar a provider and T, its time in floors.

    Sums over the seven linears where there are any, else the single linears.

    Raises:
        ValueError: nothing was timed, or too many cases.
    """
    panels = _panels(lines_of(rows))
    if not panels:
        raise ValueError(
            "the rows hold no time, so there is nothing to plot; measure again with "
            "`grasp-kernels bench --output FILE`."
        )
    if len(panels) > _MOST_PANELS:
        raise ValueError(
            f"the rows make {len(panels)} panels, more than {_MOST_PANELS}; plot fewer models, "
            "dtypes, ranks or basis sizes at a time."
        )
    # a Figure of its own needs neither pyplot nor a display
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(_COLUMNS, len(panels))
    n_rows = -(-len(panels) // columns)
    bars = [sum(map(len, panel.values())) for panel in panels.values()]
    heights = [1.3 + 0.24 * max(bars[i : i + columns]) for i in range(0, len(bars), columns)]
    figure = Figure(figsize=(6.0 * columns, 0.3 + sum(heights)), layout="constrained")
    axes = figure.subplots(n_rows, columns, squeeze=False, height_ratios=heights).flatten()
    tokens = sorted({T for panel in panels.values() for ratios in panel.values() for T in ratios})
    colours = {T: colormaps["viridis"](0.25 + 0.6 * i / len(tokens)) for i, T in enumerate(tokens)}
    for title, place in zip(panels, axes, strict=False):
        _draw(place, title, panels[title], colours)
    for place in axes[len(panels) :]:
        place.axis("off")
    handles = [Patch(color=colour, label=f"T = {T}") for T, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _panels(lines: Lines) -> dict[str, _Panel]:
    single = all(name.part in LINEARS for name in lines)
    panels: dict[str, _Panel] = {}
    for name, entries in lines.items():
        if not single and name.part in LINEARS:
            continue
        for provider, entry in entries.items():
            if entry.both is not None:
                panel = panels.setdefault(_title(name), {})
                panel.setdefault(provider, {})[name.T] = entry.both / entry.floor_ms
    return panels


def _title(name: Name) -> str:
    part = "seven linears" if name.part == "all" else name.part
    return f"{name.model}, {part}, {name.dtype}\nR = {name.R}, Q = {name.Q}, {name.machine[0]}"


def _draw(axes: Any, title: str, panel: _Panel, colours: dict[int, Any]) -> None:
    tokens = sorted({T for ratios in panel.values() for T in ratios})
    thickness = 0.8 / len(tokens)
    for i, T in enumerate(tokens):
        shown = [(y, ratios[T]) for y, ratios in enumerate(panel.values()) if T in ratios]
        places = [y + (i - (len(tokens) - 1) / 2) * thickness for y, _ in shown]
        drawn = axes.barh(places, [value for _, value in shown], thickness, color=colours[T])
        axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1.0, color="black", lw=0.8, ls="--")
    axes.set_yticks(range(len(panel)), list(panel))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("time / floor (forward + backward)")
