"""Tasks × seeds × methods -> rows, one by one, so that a run that is stopped goes on.

Everything lies in one folder:

    base/            the model
    TASK-ARM-SEED/   adapters and what methods share
    rows.jsonl       a row per point of a curve
    answers.jsonl    the answers that the rows of drift and task were counted in

One folder is for one plan and dtype: a row that is there is not measured again with other options.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.smollm2.base import base_hash, make_base
from benchmarks.quality.smollm2.bench import Bench, Plan, Point
from benchmarks.quality.smollm2.judges import Judge
from benchmarks.quality.smollm2.methods import METHODS, Method
from benchmarks.quality.smollm2.task import Task
from benchmarks.quality.smollm2.tasks import make_task
from grasp_kernels.models.checkpoint import device, load_model

Row = dict[str, Any]
BASE = "base"  # the model without an adapter, as a method of its own


@dataclass(frozen=True)
class Work:
    """What to measure.

    Args:
        tasks: (task, arm) pairs.
        methods: names in `METHODS`.
        dtype: of the frozen model, trained and judged.

    Raises:
        ValueError: an unknown task, arm or method.
    """

    tasks: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    dtype: str = "float32"
    plan: Plan = field(default_factory=Plan)

    def __post_init__(self) -> None:
        for task, arm in self.tasks:
            make_task(task, arm, 0)
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ValueError(f"method is {unknown[0]!r}: choose of {', '.join(METHODS)}.")


def measure(
    work: Work, output: Path, *, base: Path | None = None, say: Callable[[str], None] = print
) -> None:
    """Append the rows that are missing; a task and seed is finished before the next begins."""
    base = base or make_base(output / "base")
    about = _about(base, work)
    for seed in work.seeds:
        for name, arm in work.tasks:
            _measure(work, make_task(name, arm, seed), base, about, output, say)


def _measure(
    work: Work, task: Task, base: Path, about: Row, output: Path, say: Callable[[str], None]
) -> None:
    """Append the rows that are missing of one task and seed."""
    rows = output / "rows.jsonl"
    head = {"task": task.name, "arm": task.arm, "seed": task.seed}
    plan = replace(work.plan, options=(*work.plan.options, ("dtype", work.dtype)))
    bench = Bench(task, base, output / f"{task.name}-{task.arm}-{task.seed}", plan)
    judge = Judge(task, bench.inputs.tokenizer)
    options = {name: getattr(bench.config, name) for name in _OPTIONS}

    def add(method: str, steps: int, scale: float, point: Point | None) -> None:
        key = {**head, "method": method, "steps": steps, "scale": scale}
        if key in keys(rows):
            return
        scores = judge.scores(_model(base, point, work.dtype))
        row = {**key, **_numbers(point), **scores.numbers(), **about, **options}
        append(output / "answers.jsonl", {**key, **options, "answers": scores.answers})
        append(rows, row)
        say(_line(row))

    add(BASE, 0, 1.0, None)
    for method in (m for m in METHODS.values() if m.name in work.methods):
        if not _is_done(rows, head, method, plan):
            for point in method.build(bench):
                add(method.name, point.steps, point.scale, point)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; a line that a stopped run left unfinished does not count."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [row for line in lines if (row := _parsed(line)) is not None]


def _parsed(line: str) -> Row | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


KEY = ("task", "arm", "seed", "method", "steps", "scale")
# Of a training, told in its rows.
_OPTIONS = ("learning_rate", "lr_scheduler_type", "num_documents", "max_new_tokens")


def keys(path: Path) -> list[Row]:
    """Which points a file has a line of."""
    return [{part: row[part] for part in KEY} for row in read_rows(path)]


def _is_done(path: Path, head: Row, method: Method, plan: Plan) -> bool:
    """Whether every point of a curve has its row."""
    own = {**head, "method": method.name}.items()
    there = {(row["steps"], row["scale"]) for row in keys(path) if own <= row.items()}
    return method.points(plan) <= there


def append(path: Path, value: Row) -> None:
    """Add a line in one write, so that two processes may share a file."""
    begun = path.exists() and not path.read_bytes().endswith(b"\n")  # by a run that was stopped
    line = ("\n" if begun else "") + json.dumps(value, ensure_ascii=False) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode(errors="replace"))


def load_adapted(base: Path, adapter: Path, dtype: str) -> Any:
    """The base model with an adapter of peft on it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(base, dtype), str(adapter)).eval()


def _model(base: Path, point: Point | None, dtype: str) -> Any:
    if point is None:
        return load_model(base, dtype)
    adapted = load_adapted(base, point.folder, dtype)
    if point.scale != 1:
        for layer in adapted.modules():
            if hasattr(layer, "scale_layer"):
                layer.scale_layer(point.scale)
    return adapted


def _numbers(point: Point | None) -> Row:
    if point is None:
        return {"loss": None, "seconds": 0.0}
    return {"loss": point.loss, "seconds": point.seconds}


def _about(base: Path, work: Work) -> Row:
    """Where and with what the rows were measured."""
    return {
        "torch": torch.__version__,
        "device": _processor() if device().type == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "dtype": work.dtype,
        "commit": _commit(),
        "base": base_hash(base),
    }


def _commit() -> str | None:
    """The commit of this file; None where git is not there or knows of none."""
    try:
        known = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return known.stdout.strip() or None


def _processor() -> str:
    """The name of the processor and whether it multiplies bfloat16."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), None)
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{name or platform.processor()}{', avx512_bf16' if 'avx512_bf16' in flags else ''}"


def _line(row: Row) -> str:
    parts = ("loss", "accuracy", "drift", "near", "bare")
    numbers = [f"{part} {row[part]:.3f}" for part in parts if row[part] is not None]
    point = f"{row['method']} x {row['scale']} @ {row['steps']}"
    return " · ".join([f"{row['task']}-{row['arm']}-{row['seed']}", point, *numbers])
