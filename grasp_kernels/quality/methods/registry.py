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

Strength = float | int | str | None
Build = Callable[[Workbench, Any], Any]


@dataclass(frozen=True)
class Method:
    """One method of the benchmark.

    Attributes:
        what: one line.
        source: paper and arXiv id, or "ours".
        information: one of `INFORMATION`.
        strengths: candidates, weakest first; (None,) where there is nothing to tune.
        curve: every strength is reported, none is chosen.
        fits: whether a dish has what the method needs.
    """

    name: str
    what: str
    source: str
    information: str
    strengths: tuple[Strength, ...]
    build: Build
    curve: bool
    fits: Callable[[Dish], bool]


METHODS: dict[str, Method] = {}


def method(
    name: str,
    what: str,
    *,
    source: str = "ours",
    information: str = "none",
    strengths: tuple[Strength, ...] = (None,),
    curve: bool = False,
    fits: Callable[[Dish], bool] = lambda dish: True,
) -> Callable[[Build], Build]:
    """Register the decorated function as a method.

    Raises:
        ValueError: the name is taken, or the information is of no known kind.
    """
    if name in METHODS or information not in INFORMATION:
        raise ValueError(
            f"The method {name!r} with information {information!r} cannot be registered: choose a "
            f"new name and one of {', '.join(INFORMATION)}."
        )

    def register(build: Build) -> Build:
        METHODS[name] = Method(name, what, source, information, strengths, build, curve, fits)
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
