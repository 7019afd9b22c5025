"""Numbers of a report -> PNG files. Measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_kernels.pages import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"naive": "tab:red", "retrained": "tab:blue"}
_LABELS = {"naive": "naive LoRA", "retrained": "retrained LoRA"}


def draw_figures(numbers: dict[str, Any], folder: Path) -> list[str]:
    """Draw what the numbers allow into `folder`, as PNG and SVG.

    Returns:
        The names of the PNG files, in the order of the report.
    """
    adapters = numbers["adapters"]
    drawn = {"training.png": _training(adapters)}
    if adapters["naive"]["leakage"]:
        drawn["leakage.png"] = _leakage(adapters)
    if "movement" in adapters["naive"]:
        drawn["movement.png"] = _movement(adapters, numbers["chance_share"])
    for name, figure in drawn.items():
        for path in (folder / name, (folder / name).with_suffix(".svg")):
            save_figure(figure, path)
    return list(drawn)


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    # A Figure of its own needs no display and leaves the pyplot state of the caller alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3.8), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _training(adapters: dict[str, Any]) -> Figure:
    figure, (axes,) = _figure(1)
    for name, adapter in adapters.items():
        steps, losses = adapter["curve"]["step"], adapter["curve"]["loss"]
        axes.plot(steps, losses, color=_COLOURS[name], alpha=0.25, linewidth=1)
        axes.plot(steps, smoothed(losses), color=_COLOURS[name], label=_LABELS[name])
    axes.set(xlabel="optimizer step", ylabel="training loss", title="Training", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def smoothed(values: list[float], parts: int = 20) -> list[float]:
    """Mean over the last part (a 20th) of the training up to each step."""
    width = max(1, len(values) // parts)
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _leakage(adapters: dict[str, Any]) -> Figure:
    figure, (axes,) = _figure(1)
    for name, adapter in adapters.items():
        style: dict[str, Any] = {"color": _COLOURS[name], "label": _LABELS[name]}
        values = list(adapter["leakage"].values())
        axes.plot(values, linestyle="", marker="o", markersize=4, clip_on=False, **style)
    axes.set(
        xlabel="layers that write to the stream, first to last",
        ylabel="‖Vᵀ ΔW‖ / ‖ΔW‖",
        title="Adapter weights in the subspace",
    )
    axes.set_yscale("symlog", linthresh=1e-6)
    axes.set_ylim(0, 1.5)
    axes.legend(frameon=False, loc="center right")
    return figure


def _movement(adapters: dict[str, Any], chance: float) -> Figure:
    figure, (left, right) = _figure(2)
    styles = {"training": "-", "neutral": "--"}
    for name, adapter in adapters.items():
        for kind, movement in adapter["movement"].items():
            layers, along = movement["layers"], movement["along"]
            share = [a / t if t else 0.0 for a, t in zip(along, movement["total"], strict=True)]
            style: dict[str, Any] = {"color": _COLOURS[name], "linestyle": styles[kind]}
            style |= {"marker": "o", "markersize": 3, "label": f"{_LABELS[name]}, {kind} prompts"}
            left.plot(layers, along, **style)
            right.plot(layers, share, **style)
    right.axhline(chance, color="grey", linestyle=":", label="a random subspace of this size")
    left.set(
        xlabel="after block", ylabel="mean ‖Vᵀ(h − h_base)‖", title="Movement along the subspace"
    )
    right.set(
        xlabel="after block", ylabel="share of ‖h − h_base‖", title="Its share of all movement"
    )
    for axes in (left, right):
        axes.set_ylim(0, None)
        axes.locator_params(axis="x", integer=True)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
