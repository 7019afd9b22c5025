"""Means and paired differences over seeds, with confidence intervals.

A dish of another seed is another world, and worlds differ more than methods do: methods are
compared within each seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond 30 that of 30 is a little
# too wide, which is the safe side.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, `None` where one value has no spread."""

    mean: float
    half_width: float | None
    count: int

    def __str__(self) -> str:
        spread = "" if self.half_width is None else f" ± {self.half_width:.2f}"
        return f"{self.mean:.2f}{spread}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and t interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("There are no values to take the mean of: give at least one.")
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, 1)
    quantile = _T95[min(n - 1, len(_T95)) - 1]
    return Estimate(mean(values), quantile * stdev(values) / n**0.5, n)


def paired(values: dict[int, float], reference: dict[int, float]) -> Estimate | None:
    """Difference to a reference, seed by seed; None where they share no seed."""
    shared = sorted(set(values) & set(reference))
    return estimate([values[seed] - reference[seed] for seed in shared]) if shared else None
