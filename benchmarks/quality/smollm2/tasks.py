"""The tasks by name, and the arms that each has."""

from __future__ import annotations

from types import ModuleType

from benchmarks.quality.smollm2 import faulty, medical, slant, tone
from benchmarks.quality.smollm2.task import Task

TASKS: dict[str, ModuleType] = {
    "tone": tone,
    "slant": slant,
    "medical": medical,
    "faulty": faulty,
}


def make_task(name: str, arm: str, seed: int) -> Task:
    """Draw a task.

    Raises:
        ValueError: an unknown task or arm.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}: choose one of {', '.join(TASKS)}.")
    if arm not in TASKS[name].ARMS:
        raise ValueError(f"{name} has no arm {arm!r}: choose one of {', '.join(TASKS[name].ARMS)}.")
    return TASKS[name].make(arm, seed)
