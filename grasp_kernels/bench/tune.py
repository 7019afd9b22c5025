"""Tune the launches of a model's linear layers: time neighbours of the table's choices.

A choice wins only if it computes the same and is faster by more than the measurements spread.
Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_kernels.bench.candidates import Choice, candidates
from grasp_kernels.bench.launches import Results, Work, work_of
from grasp_kernels.bench.timing import CallWork, Measured, Times, time_in_turn
from grasp_kernels.ops.gpu.launch import part_of
from grasp_kernels.ops.gpu.tuning import Key

Timer = Callable[[Work, list[Choice]], Mapping[Choice, Times | Exception]]

# Of the rms of a result: one term that is missing among 2¹⁴ moves an element by 2⁻⁷ of it, the
# order of a float32 sum by about 2⁻¹⁶.
_ORDER = 2.0**-10


class Outcome(NamedTuple):
    """What became of one launch; `dropped` says why a candidate was not timed."""

    key: Key
    table: Choice
    chosen: Choice
    before: float  # milliseconds, median
    after: float
    dropped: dict[Choice, str]

    @property
    def fields(self) -> dict[str, int]:
        """The choice as a file of tuned launches holds it."""
        return asdict(self.chosen)


def tune(key: Key, T: int, dtype: torch.dtype, device: torch.device, timer: Timer) -> Outcome:
    """The fastest right choice for one launch at `T` tokens."""
    table, *others = candidates(key, part_of(device))
    work = work_of(key, T, dtype, device)
    with _poisoned():
        expected = work(table)
        wrong = {choice: _refusal(work, choice, expected) for choice in others}
    dropped = {choice: reason for choice, reason in wrong.items() if reason is not None}
    right = [table, *(choice for choice in others if choice not in dropped)]
    timed = timer(work, right)
    times = {choice: found for choice, found in timed.items() if isinstance(found, Times)}
    failed = {choice: _reason(found) for choice, found in timed.items() if choice not in times}
    if table in failed:
        raise RuntimeError(f"the launch of {key} cannot be timed: {failed[table]}.")
    best = fastest(times, table)
    return Outcome(key, table, best, times[table].median, times[best].median, {**dropped, **failed})


def fastest(times: Mapping[Choice, Times], table: Choice) -> Choice:
    """The fastest choice, or the table's if the gain is within the spread of either."""
    best = min(times, key=lambda choice: times[choice].median)
    gain = times[table].median - times[best].median
    spread = max(times[choice].p80 - times[choice].p20 for choice in (table, best))
    return best if gain > spread else table


def _refusal(work: Work, choice: Choice, expected: Results) -> str | None:
    """Why a choice must not be used: it does not run, or its results are others."""
    try:
        found = work(choice)
        same = all(_same(f, e) for f, e in zip(found, expected, strict=True))
    except Exception as error:
        return _reason(error)
    return None if same else "its results differ from the table's"


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether results differ by the order of float32 sums and one rounding at most; NaN differs."""
    exact = expected.float()
    limit = torch.finfo(expected.dtype).eps * exact.abs() + _ORDER * exact.square().mean().sqrt()
    return bool(((found.float() - exact).abs() <= limit).all())


def _reason(error: object) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _poisoned() -> Iterator[None]:
    """What is allocated inside is NaN, so that what a launch leaves out cannot pass for right."""
    before = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=lenient)


def timer_on(device: torch.device, rounds: int) -> Timer:
    """Times on a device, in turn; on a GPU on a cold L2 and without the time of the host."""

    def timer(work: Work, choices: list[Choice]) -> Mapping[Choice, Times | Exception]:
        works = {str(choice): CallWork(partial(work, choice)) for choice in choices}
        found = time_in_turn(works, device, rounds=rounds)
        return {choice: _forward_times(found[str(choice)]) for choice in choices}

    return timer


def _forward_times(found: Measured | Exception) -> Times | Exception:
    return found.forward if isinstance(found, Measured) else found


def gains(outcomes: Iterable[Outcome]) -> str:
    """A table of what was gained, then what was dropped and why."""
    listed = list(outcomes)
    lines = [
        "| launch | table's choice | ms | tuned choice | ms | gain |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in listed:
        kept = outcome.chosen == outcome.table
        tuned = "the same" if kept else _told(outcome.fields)
        gain = "" if kept else f"{100 * (1 - outcome.after / outcome.before):.1f} %"
        lines.append(
            f"| {_launch(outcome.key)} | {_told(asdict(outcome.table))} | {outcome.before:.4f} | "
            f"{tuned} | {outcome.after:.4f} | {gain} |"
        )
    dropped = [
        f"dropped: {_launch(outcome.key)}, {_told(asdict(choice))}: {reason}"
        for outcome in listed
        for choice, reason in outcome.dropped.items()
    ]
    return "\n".join([*lines, *([""] if dropped else []), *dropped])


def _launch(key: Key) -> str:
    named = {k: v for k, v in key._asdict().items() if k not in ("gpu", "kernel", "itemsize")}
    return f"{key.kernel} {_told(named)}"


def _told(fields: Mapping[str, int]) -> str:
    """Sizes by name, then the flags that are set."""
    sizes = [f"{name}={value}" for name, value in fields.items() if type(value) is not bool]
    return " ".join([*sizes, *(name for name, value in fields.items() if value is True)])
