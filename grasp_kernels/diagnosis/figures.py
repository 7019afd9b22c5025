"""A diagnosis as JSON -> one figure. Measures nothing."""

from __future__ import annotations

from os import PathLike
from typing import Any

from grasp_kernels.pages import save_figure

_COLOURS = ("tab:blue", "tab:cyan", "tab:purple", "tab:olive", "tab:red")


def draw(numbers: dict[str, Any], path: str | PathLike[str]) -> None:
    """Save a PNG: movement, steering and exchange of every direction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 3.8), layout="constrained")
    figure.suptitle(f"Verdict: {numbers['verdict']}")
    movement, steering, exchange = figure.subplots(1, 3)
    directions = numbers["directions"]
    # the movement is red wherever it stands, the weights are blue
    colours = [
        _COLOURS[-1] if one["name"] == "movement" else _COLOURS[i]
        for i, one in enumerate(directions)
    ]
    _movement(movement, directions, colours)
    _steering(steering, directions, colours)
    _exchange(exchange, directions, colours)
    save_figure(figure, path)


def _movement(axes: Any, directions: list[dict[str, Any]], colours: list[str]) -> None:
    for one, colour in zip(directions, colours, strict=True):
        neutral = one["neutral"]
        parts = [
            [a / b if b else 0.0 for a, b in zip(neutral[key], neutral["stream"], strict=True)]
            for key in ("size", "random")
        ]
        axes.plot(parts[0], "o-", color=colour, label=one["name"])
    if directions:
        axes.plot(parts[1], "--", color="gray", label="random")
        axes.legend(frameon=False)
    axes.set(
        title="Movement of neutral prompts",
        xlabel="block",
        ylabel="part of the stream's length",
        ylim=(0, None),
    )
    axes.xaxis.get_major_locator().set_params(integer=True)


def _steering(axes: Any, directions: list[dict[str, Any]], colours: list[str]) -> None:
    for one, colour in zip(directions, colours, strict=True):
        rows = one["steering"].get("answers", one["steering"]["tokens"])
        doses = [row["dose"] for row in rows]
        for key, style in (("value", "o-"), ("random_mean", "--")):
            label = one["name"] if key == "value" else None
            axes.plot(doses, [row[key] for row in rows], style, color=colour, label=label)
    answers = any("answers" in one["steering"] for one in directions)
    axes.axhline(0, color="gray", lw=0.8)
    axes.set(
        title="Steering the base model (dashed: random directions)",
        xlabel="dose",
        ylabel="log probability of the training answers"
        if answers
        else "probability of raised tokens",
    )
    if directions:
        axes.legend(frameon=False)


def _exchange(axes: Any, directions: list[dict[str, Any]], colours: list[str]) -> None:
    places = [(i, key) for i in range(len(directions)) for key in ("removal", "transfer")]
    names = [f"{directions[i]['name']}, {key}" for i, key in places]
    values = [directions[i][key]["value"] for i, key in places]
    bars = axes.barh(names, values, color=[colours[i] for i, _ in places])
    axes.bar_label(bars, [f"{value:.0%}" for value in values], padding=3)
    for row, (i, key) in enumerate(places):
        axes.plot([directions[i][key]["random_max"]] * 2, [row - 0.4, row + 0.4], "k--", lw=1)
    axes.set(
        title="Effect on neutral prompts that a direction carries",
        xlabel="part of the effect (dashed: largest of the random directions)",
        xlim=(min(0.0, *values, 0.0), 1.15),
    )
    axes.invert_yaxis()
