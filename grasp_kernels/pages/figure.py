"""A figure as PNG for a Markdown file, and as SVG that takes the colours of a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from grasp_kernels.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#010203"  # of text and axes; no figure has it for anything else, so that it can be replaced
_PARTS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


@contextmanager
def drawing() -> Iterator[None]:
    """Within it, text and axes get a colour that `save_figure` knows."""
    import matplotlib

    with matplotlib.rc_context(dict.fromkeys(_PARTS, _INK)):
        yield


def save_figure(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a figure, whole or not at all: as SVG where the path ends so, and else as PNG.

    An SVG has no background. Its text and axes have the colour of the text around it, where the
    figure was made within `drawing`.
    """
    import matplotlib

    if Path(path).suffix != ".svg":
        with whole_file(path) as partial:
            figure.savefig(partial, format="png", dpi=150)
        return
    drawn = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grasp_kernels"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    # Without the XML header, which may not stand within a page.
    svg = drawn.getvalue()[drawn.getvalue().index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    with whole_file(path) as partial:
        partial.write_text(svg, encoding="utf-8")
