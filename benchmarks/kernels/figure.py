"""`python -m benchmarks.kernels.figure`: time by tokens beside stock peft, drawn from the rows."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.kernels.rows import Row, read_rows
from grasp_kernels.files import whole_file

_RESULTS = Path(__file__).parents[1] / "results"
_FIGURE = Path(__file__).parents[2] / "docs" / "tokens.png"
# Title, file, level of its rows, and what each provider is called.
_PANELS = (
    (
        "H200, decoder layer of Llama-3.1-8B",
        "h200.jsonl",
        "layer",
        {
            "peft-default": "peft out of the box",
            "frozen": "frozen layers alone",
            "grasp-aten-projected": "ours, aten",
            "grasp-cuda-projected": "ours, cuda",
            "grasp-triton-projected": "ours, triton",
        },
    ),
    (
        "2 CPU threads, linears of a layer of Qwen2.5-0.5B",
        "cpu.jsonl",
        "linear",
        {"frozen": "frozen layers alone", "grasp-projected": "ours, aten"},
    ),
)

_COLOURS = {"frozen layers alone": "tab:gray", "ours, aten": "tab:green"}  # in both panels


def ratios(rows: Iterable[Row], level: str, provider: str) -> dict[int, float]:
    """T -> bfloat16 time of a provider, forward and backward, over that of stock peft."""
    times: dict[str, dict[int, float]] = {"peft": defaultdict(float), provider: defaultdict(float)}
    for row in rows:
        if (row["level"], row["dtype"]) == (level, "bfloat16") and row["provider"] in times:
            times[row["provider"]][row["T"]] += row["both"]["median"]
    return {T: time / times["peft"][T] for T, time in sorted(times[provider].items())}


def draw(path: Path) -> None:
    """Draw a panel for each device, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (title, file, level, providers) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        rows = read_rows(_RESULTS / file)
        axes.axhline(1, color="black", linewidth=1, label="stock peft, bfloat16")
        for provider, label in providers.items():
            found = ratios(rows, level, provider)
            style = {"marker": "o", "label": label, "color": _COLOURS.get(label)}
            axes.plot(list(found), list(found.values()), **style)
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(found), [str(T) for T in found])
        axes.set(title=title, xlabel="tokens in a call", ylabel="time, stock peft = 1")
        axes.legend(frameon=False, fontsize="small")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.figure", description=__doc__
    )
    parser.add_argument("--output", type=Path, default=_FIGURE, help="file (default: %(default)s)")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
