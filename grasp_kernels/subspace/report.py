"""A subspace for human eyes: a short table, and one figure.

Both show what every source of a subspace puts into `evidence` ("spectra" and "agreement", see
`Subspace`), so they work for any of them.
"""

from __future__ import annotations

from os import PathLike
from statistics import median
from typing import TYPE_CHECKING, Any

from grasp_kernels.inert import inert
from grasp_kernels.pages import save_figure

if TYPE_CHECKING:
    from grasp_kernels.subspace.basis import Subspace

_SHOWN = 12  # singular values; more of them say nothing about the first few
_COLOUR = "tab:blue"


def summary(subspace: Subspace) -> str:
    """Number of directions, one line for each spectrum, agreement, reasons."""
    lines = [_directions(subspace)]
    if not subspace.is_empty:
        lines[0] += f" {len(subspace.bases)} modules have a basis."
    spectra = subspace.evidence.get("spectra", [])
    if spectra:
        lines.append(f"{'k':>3}{'gap':>8}   singular values (95 % of the null)")
    for record in spectra:
        pairs = list(zip(record["singular_values"], record["null"], strict=False))[:4]
        values = "  ".join(f"{value:.3f} ({null:.3f})" for value, null in pairs)
        lines.append(f"{record['k']:>3}{record['gap']:>8.2f}   {values}")
    for record in subspace.evidence.get("agreement", []):
        lines.append(
            f"agreement of the layers: median {median(record['values']):.2f}, lowest "
            f"{min(record['values']):.2f}, by chance {record['chance']:.2f}"
        )
    return "\n".join([*lines, *(f"- {inert(reason)}" for reason in subspace.reasons)])


def plot(subspace: Subspace, path: str | PathLike[str]) -> None:
    """Save a PNG: left the spectrum with its null, right the agreement.

    Raises:
        ValueError: the subspace was not identified, so there is nothing to show.
    """
    spectra = subspace.evidence.get("spectra", [])
    if not spectra:
        raise ValueError(
            "This subspace carries no spectra in its evidence; plot one that identify has returned."
        )
    # a Figure of its own needs neither pyplot nor a display and leaves the caller's backend alone
    from matplotlib.figure import Figure

    agreement = subspace.evidence.get("agreement", [])
    figure = Figure(figsize=(10.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_spectra(left, spectra)
    _plot_agreement(right, agreement)
    figure.suptitle(_directions(subspace))
    save_figure(figure, path)


def _directions(subspace: Subspace) -> str:
    if subspace.is_empty:
        return "No direction stands above chance."
    many = "1 direction" if subspace.k == 1 else f"{subspace.k} directions"
    return f"{many}, shared by all layers."


def _plot_spectra(axes: Any, spectra: list[dict[str, Any]]) -> None:
    for record in spectra:
        values, null = record["singular_values"][:_SHOWN], record["null"][:_SHOWN]
        axes.plot(range(1, len(values) + 1), values, "o-", color=_COLOUR, label="found")
        axes.fill_between(
            range(1, len(null) + 1),
            0,
            null,
            color=_COLOUR,
            alpha=0.15,
            lw=0,
            label="below 95 % of the null",
        )
        if record["k"]:
            chosen = f"chosen k = {record['k']}"
            axes.axvline(record["k"] + 0.5, color=_COLOUR, ls=":", label=chosen)
    axes.set(xlabel="index", ylabel="singular value of the stacked blocks", ylim=(0, None))
    axes.legend(frameon=False)


def _plot_agreement(axes: Any, agreement: list[dict[str, Any]]) -> None:
    for record in agreement:
        axes.plot(record["layers"], record["values"], "o-", color=_COLOUR, label="found")
        axes.axhline(record["chance"], color=_COLOUR, ls="--", alpha=0.5, label="by chance")
    axes.set(xlabel="layer", ylabel="agreement with the other layers (cosine)", ylim=(0, 1.05))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if agreement:
        axes.legend(frameon=False)
