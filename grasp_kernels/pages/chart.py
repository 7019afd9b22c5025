"""Lines over steps -> an SVG for light and for dark pages."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 28, 44  # margins of the plot
_INK = "#7f7f7f"  # of text and axes


class Line(NamedTuple):
    """Hold values of `y` at `x`; a pale line has no entry in the legend."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    is_pale: bool = False


def line_chart(lines: Sequence[Line], x: str, y: str) -> str:
    """Draw lines into one plot; its axes begin at 0.

    Args:
        x, y: titles of the axes.
    """
    right = max((value for line in lines for value in line.x), default=1.0) or 1.0
    top = max((value for line in lines for value in line.y), default=1.0) or 1.0

    def place(across: float, up: float) -> tuple[float, float]:
        return (
            _LEFT + across / right * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up / top * (_HEIGHT - _TOP - _BOTTOM),
        )

    (x0, y0), (x1, y1) = place(0, 0), place(right, top)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<path d="M{x0:.1f} {y1:.1f}V{y0:.1f}H{x1:.1f}" fill="none" stroke="{_INK}"/>',
        _text((x0 + x1) / 2, _HEIGHT - 8, x),
        f'<g transform="translate(14 {(y0 + y1) / 2:.1f}) rotate(-90)">{_text(0, 0, y)}</g>',
    ]
    parts += [_text(place(tick, 0)[0], y0 + 18, f"{tick:g}") for tick in _ticks(right)]
    parts += [_text(x0 - 6, place(0, t)[1] + 4, f"{t:g}", "end") for t in _ticks(top)]
    legend = [line for line in lines if not line.is_pale]
    for i, line in enumerate(legend):
        along = x0 + i * (x1 - x0) / len(legend)
        parts.append(f'<path d="M{along:.1f} 14h24" stroke="{line.colour}" stroke-width="2"/>')
        parts.append(_text(along + 30, 18, line.label, "start"))
    for line in lines:
        points = [place(*pair) for pair in zip(line.x, line.y, strict=True)]
        drawn = " ".join(f"{across:.1f},{up:.1f}" for across, up in points)
        style = 'stroke-opacity="0.3"' if line.is_pale else 'stroke-width="2"'
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{line.colour}" {style}/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(most: float) -> Iterator[float]:
    """Return at most six round numbers from 0 up to `most`."""
    rough = most / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return (i * step for i in range(math.floor(most / step) + 1))
