"""Methods by name: what each is, where it comes from, what it knows, which strengths it has.

A method is one function, `(bench, strength) -> model`; the decorator `method` registers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from grasp_kernels.quality.dishes import Dish
from grasp_kernels.quality.workbench import Workbench

# What a method sees besides base model and training data, from least to most.
INFORMATION = ("none", "off-topic prompts", "benign answers", "labels")
# GRASP in all its forms and what we put beside it, what others do, and what shows why it works.
ORIGINS = ("ours", "others", "control")

Strength = float | int | str | None
Build = Callable[[Workbench, Any], Any]


@dataclass(frozen=True)
class Method:
    """One method of the benchmark.

    Attributes:
        what: one line.
        source: paper and arXiv id, or "ours".
        information: one of `INFORMATION`.
        origin: one of `ORIGINS`.
        strengths: candidates, weakest first; (None,) where there is nothing to tune.
        curve: every strength is reported, none is chosen.
        fits: whether a dish has what the method needs.
    """

    name: str
    what: str
    source: str
    information: str
    origin: str
    strengths: tuple[Strength, ...]
    build: Build
    curve: bool
    fits: Callable[[Dish], bool]

    @property
    def is_tuned(self) -> bool:
        """Whether one strength is chosen and reported."""
        return len(self.strengths) > 1 and not self.curve


METHODS: dict[str, Method] = {}


def method(
    name: str,
    what: str,
    *,
    source: str = "ours",
    information: str = "none",
    origin: str = "others",
    strengths: tuple[Strength, ...] = (None,),
    curve: bool = False,
    fits: Callable[[Dish], bool] = lambda dish: True,
) -> Callable[[Build], Build]:
    """Register the decorated function as a method.

    Raises:
        ValueError: the name is taken, or the information or the origin is of no known kind.
    """
    if name in METHODS or information not in INFORMATION or origin not in ORIGINS:
        raise ValueError(
            f"The method {name!r} with information {information!r} and origin {origin!r} cannot be "
            f"registered: choose a new name, one of {', '.join(INFORMATION)} and one of "
            f"{', '.join(ORIGINS)}."
        )

    def register(build: Build) -> Build:
        about = (name, what, source, information, origin, strengths)
        METHODS[name] = Method(*about, build, curve, fits)
        return build

    return register


def select(names: Iterable[str]) -> list[Method]:
    """Methods by name in the order of registration; "all" means every one.

    Raises:
        ValueError: an unknown name.
    """
    wanted = set(names)
    if unknown := sorted(wanted - set(METHODS) - {"all"}):
        raise ValueError(f"method is {unknown[0]!r}: choose all, or of {', '.join(METHODS)}.")
    return [m for m in METHODS.values() if "all" in wanted or m.name in wanted]
