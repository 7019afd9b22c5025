"""Every case with every provider, checked, then timed.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from benchmarks.kernels import cost
from benchmarks.kernels.gate import Gate
from benchmarks.kernels.levels import GROUPS, Case, Group
from benchmarks.kernels.machine import environment, measure_rates
from benchmarks.kernels.provider import Refusal, dtype_of
from benchmarks.kernels.providers import LEVELS, PROVIDERS, choose
from benchmarks.kernels.rows import Row
from benchmarks.kernels.shapes import MODELS
from benchmarks.kernels.timing import Measured, time_in_turn
from grasp_kernels.cpu import warn_if_slow

_MISSING = {"median": None, "p20": None, "p80": None}


def device_of(name: str) -> torch.device:
    """The device of a name, if it can be timed here."""
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device is {name!r}, which cannot be timed here; use 'cpu', or 'cuda' where torch "
            "sees a GPU."
        )
    return torch.device(name)


@dataclass(frozen=True)
class Suite:
    """What to measure.

    Attributes:
        level: "linear" (the linears of a decoder layer, each by itself), "layer" (a decoder layer)
            or "step" (a training step of the model, with and without activation checkpointing).
        models, dtypes, tokens, ranks: every combination is a case.
        basis: sizes Q of the basis of the writers; 0 for none.
        rounds: measurements of each provider.
        providers: names, or "all"; none for the usual ones.
        layers: decoder layers of a step; None for those of the model.
    """

    level: str = "linear"
    models: tuple[str, ...] = ("qwen2.5-0.5b",)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    tokens: tuple[int, ...] = (512,)
    ranks: tuple[int, ...] = (16,)
    basis: tuple[int, ...] = (4,)
    rounds: int = 15
    providers: tuple[str, ...] = ()
    layers: int | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        for field, names, known in (
            ("level", (self.level,), LEVELS),
            ("models", self.models, MODELS),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(
                    f"{field} is {unknown[0]!r}, which is unknown; use some of {sorted(known)}."
                )
        for name in self.dtypes:
            dtype_of(name)
        choose(self.providers, self.level)
        layers = () if self.layers is None else (self.layers,)
        sizes = {"tokens": self.tokens, "ranks": self.ranks, "layers": layers, "basis": self.basis}
        for field, values in {**sizes, "rounds": (self.rounds,)}.items():
            least = {"basis": 0, "rounds": 2}.get(field, 1)
            if small := [value for value in values if value < least]:
                raise ValueError(f"{field} is {small[0]}; give at least {least}.")
        device_of(self.device)


def run_suite(suite: Suite) -> Iterator[Row]:
    """One row a case and provider, in the order of the table."""
    device = torch.device(suite.device)
    machine = environment(device)
    rates = cache(lambda dtype: measure_rates(dtype, device))
    names = choose(suite.providers, suite.level)
    if device.type == "cpu":
        for name in suite.dtypes:
            warn_if_slow(dtype_of(name), "stock peft is slow there, and ratios to it say little")
    for group in GROUPS[suite.level](suite):
        if suite.level != "linear":  # whole models refer to themselves; the last one must go
            gc.collect()
        found = rates(group.dtype)  # before the first case of a dtype
        gated = cache(partial(_refusals, group, names, device))
        for case in group.cases:
            reason = case.refusal()  # before the gate, which would be for nothing
            refused = gated() if reason is None else dict.fromkeys(names, reason)
            for row in _measure(case, group, suite, refused, found):
                yield {**row, **found._asdict(), **machine}


def _refusals(
    group: Group, names: tuple[str, ...], device: torch.device
) -> dict[str, Refusal | None]:
    gate = Gate(group.subject(), group.dtype)
    nothing = Refusal("unavailable", "nothing is projected with Q = 0")
    return {
        name: nothing
        if PROVIDERS[name].projects and group.Q == 0
        else gate.refusal(PROVIDERS[name], device)
        for name in names
    }


def _measure(
    case: Case,
    group: Group,
    suite: Suite,
    refused: Mapping[str, Refusal | None],
    rates: cost.Rates,
) -> Iterator[Row]:
    device = torch.device(suite.device)
    outcomes = _outcomes(case, suite, refused, device)
    products = cost.total([cost.frozen_flops(linear, case.T) for linear in case.linears])
    extra = cost.total([cost.extra_bytes(x, case.T, group.dtype.itemsize) for x in case.linears])
    products, extra = (cost.total([part], case.times) for part in (products, extra))
    floor = cost.floor_ms(cost.total([products, case.head]), extra, rates)
    for name, outcome in outcomes.items():
        provider = PROVIDERS[name]
        needed = cost.needed_flops(
            case.linears,
            case.T,
            group.R,
            group.Q,
            adapts=provider.adapters != "none",
            projects=provider.projects,
        )
        refusal = outcome if isinstance(outcome, Refusal) else None
        yield {
            **case.labels,
            "R": group.R,
            "Q": group.Q,
            "provider": name,
            "projects": provider.projects,
            "backend": provider.backend,
            "refused": refusal and refusal.reason,
            "refusal": refusal and refusal.kind,
            "rounds": suite.rounds,
            **_times(outcome),
            "floor_ms": floor.as_row(),
            "flops": cost.total([cost.total([needed], case.times), case.head]).as_row(),
            "extra_bytes": extra.as_row(),
        }


def _outcomes(
    case: Case, suite: Suite, refused: Mapping[str, Refusal | None], device: torch.device
) -> dict[str, Measured | Refusal]:
    """The times or the refusal of each provider."""
    works: dict[str, Any] = {}
    failed: dict[str, Refusal] = {}
    for name, refusal in refused.items():
        if refusal is not None:
            failed[name] = refusal
            continue
        try:
            works[name] = case.work(PROVIDERS[name])
        except Exception as error:
            failed[name] = PROVIDERS[name].failure(error)
    measured = time_in_turn(works, device, rounds=suite.rounds)
    return {
        name: failed[name] if name in failed else _checked(name, measured[name]) for name in refused
    }


def _checked(name: str, found: Measured | Exception) -> Measured | Refusal:
    return PROVIDERS[name].failure(found) if isinstance(found, Exception) else found


def _times(outcome: Measured | Refusal) -> Row:
    if isinstance(outcome, Measured):
        return outcome.as_row()
    parts: Row = {part: dict(_MISSING) for part in ("forward", "backward", "both")}
    return {**parts, "peak_memory": None}
