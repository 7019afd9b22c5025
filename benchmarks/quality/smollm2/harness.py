"""Tasks × seeds × methods -> rows, one by one, so that a run that is stopped goes on.

Everything lies in one folder:

    base/            the model
    TASK-ARM-SEED/   adapters and what methods share
    rows.jsonl       a row per point of a curve
    answers.jsonl    the answers that the rows of drift and task were counted in
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.smollm2.base import base_hash, make_base
from benchmarks.quality.smollm2.bench import Bench, Plan, Point
from benchmarks.quality.smollm2.judges import Judge
from benchmarks.quality.smollm2.methods import METHODS
from benchmarks.quality.smollm2.tasks import make_task
from grasp_kernels.run.inputs import device, load_model

Row = dict[str, Any]
BASE = "base"  # the model without an adapter, as a method of its own


@dataclass(frozen=True)
class Work:
    """What to measure.

    Args:
        tasks: (task, arm) pairs.
        methods: names in `METHODS`.
        dtype: of the frozen model.
        keep: leave adapters where they are after they were judged.
    """

    tasks: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    dtype: str = "float32"
    plan: Plan = field(default_factory=Plan)
    keep: bool = False

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
            task = make_task(name, arm, seed)
            root = output / f"{name}-{arm}-{seed}"
            bench = Bench(task, base, root, work.plan)
            judge = Judge(task, bench.inputs.tokenizer)
            head = {"task": name, "arm": arm, "seed": seed}

            def add(key: Row, point: Point | None, judge: Judge = judge) -> None:
                if key in _keys(output / "rows.jsonl"):
                    return
                scores = judge.scores(_model(base, point, work.dtype))
                row = {**key, **_numbers(point), **scores.numbers(), **about}
                _append(output / "answers.jsonl", {**key, "answers": scores.answers})
                _append(output / "rows.jsonl", row)
                say(_line(row))

            add({**head, "method": BASE, "steps": 0, "scale": 1.0}, None)
            for method in (m for m in METHODS.values() if m.name in work.methods):
                if _is_done(output / "rows.jsonl", {**head, "method": method.name}, work.plan):
                    continue
                for point in method.build(bench):
                    key = {"method": method.name, "steps": point.steps, "scale": point.scale}
                    add({**head, **key}, point)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; a line that a stopped run left unfinished does not count."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [row for line in lines if (row := _parsed(line)) is not None]


def _parsed(line: str) -> Row | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


_KEY = ("task", "arm", "seed", "method", "steps", "scale")


def _keys(path: Path) -> list[Row]:
    return [{part: row[part] for part in _KEY} for row in read_rows(path)]


def _is_done(path: Path, head: Row, plan: Plan) -> bool:
    """Whether the last point of a curve has its row."""
    rows = [row for row in _keys(path) if head.items() <= row.items()]
    return len(rows) >= (5 if head["method"] == "scaled" else len(plan.points))


def _append(path: Path, value: Row) -> None:
    """Add a line in one write, so that two processes may share a file."""
    begun = path.exists() and not path.read_bytes().endswith(b"\n")  # by a run that was stopped
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if begun else "") + json.dumps(value, ensure_ascii=False) + "\n")


def _model(base: Path, point: Point | None, dtype: str) -> Any:
    from peft import PeftModel

    model = load_model(base, dtype)
    if point is None:
        return model
    adapted = PeftModel.from_pretrained(model, str(point.folder)).eval()
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
    known = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "torch": torch.__version__,
        "device": _processor() if device().type == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "dtype": work.dtype,
        "learning_rate": dict(work.plan.options).get("learning_rate"),
        "commit": known.stdout.strip() or None,
        "base": base_hash(base),
    }


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
