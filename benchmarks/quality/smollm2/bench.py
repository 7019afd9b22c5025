"""One task of one seed, with the files that methods share; a curve is trained by the product.

Every training is `grasp_kernels.run.stages.train` with other arguments, so what is measured here is
what the command does. The learning rate stays constant after the warm-up: the adapter after `n`
steps is that of a training of `n` steps, and one training gives a whole curve.

Folders below `root`:

    train.jsonl, own-text.safetensors, subspace.safetensors   shared by the methods
    METHOD/step-N                                              adapters of a curve
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.smollm2.task import Task
from grasp_kernels.anchor import OwnTextAnchor
from grasp_kernels.reads import ContrastiveReads
from grasp_kernels.run import stages
from grasp_kernels.run.config import RunConfig
from grasp_kernels.run.folder import RunFolder, write_json, write_lines
from grasp_kernels.run.inputs import Inputs, prepare
from grasp_kernels.run.training import LOG_NAME
from grasp_kernels.subspace import Subspace

_LOSS_STEPS = 24  # that the training loss at a point is the mean of: an epoch of `tone`


@dataclass(frozen=True)
class Plan:
    """How every method is trained.

    Args:
        steps: budget of a training.
        every: steps between two points of its curve.
        options: further options of `RunConfig`, such as learning_rate or dtype.
    """

    steps: int = 192
    every: int = 48
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def points(self) -> range:
        return range(self.every, self.steps + 1, self.every)


@dataclass(frozen=True)
class Point:
    """An adapter on the curve of a method.

    Attributes:
        steps: optimizer steps that it was trained.
        loss: mean loss of the training data over the last steps before.
        seconds: processor time of the training up to here, with what it needed beforehand.
        scale: what the finished adapter is multiplied by.
    """

    folder: Path
    steps: int
    loss: float
    seconds: float
    scale: float = 1.0


class Bench:
    """What methods work on.

    Args:
        task: the task.
        base: checkpoint folder of the model.
        root: folder of this task and seed.
        plan: how methods are trained.
    """

    def __init__(self, task: Task, base: Path, root: Path, plan: Plan) -> None:
        self.task, self.root, self.plan = task, root, plan
        root.mkdir(parents=True, exist_ok=True)
        data = root / "train.jsonl"
        if not data.exists():
            write_lines(data, [_record(*pair) for pair in task.records])
        self.config = RunConfig(
            model=str(base),
            data=str(data),
            output=str(root),
            steps=plan.steps,
            seed=task.seed,
            **{**_TRAINING, **dict(plan.options)},
        )
        self.folder = RunFolder(root)
        self.early = {
            step: self.folder.early / f"step-{step}"
            for step in stages.early_checkpoints(self.config, self.folder, _IDENTIFY_STEPS)
        }

    @cached_property
    def inputs(self) -> Inputs:
        """The checked inputs of the run."""
        return prepare(self.config, Path(self.config.model))

    def curve(
        self,
        name: str,
        *,
        subspace: Subspace | None = None,
        reads: ContrastiveReads | None = None,
        anchor: OwnTextAnchor | None = None,
        inputs: Inputs | None = None,
        made: Sequence[str] = (),
        early: bool = False,
        **options: Any,
    ) -> list[Point]:
        """Train a method, or what is missing of it, and return the points of its curve.

        Args:
            made: shared parts whose seconds it has to bear, too.
            early: also keep the early adapters that a subspace is identified from.
            options: of `RunConfig`, where they differ from the plan's.
        """
        out = self.root / name
        folders = {step: out / f"step-{step}" for step in self.plan.points}
        if not (out / "finished").exists():
            start = time.process_time()
            stages.train(
                replace(self.config, **options),
                inputs or self.inputs,
                out=out / "finished",
                work=out / "work",
                description=name,
                subspace=subspace,
                reads=reads,
                anchor=anchor,
                snapshots={**folders, **(self.early if early else {})},
            )
            self._note(name, time.process_time() - start)
        log = json.loads((out / "finished" / LOG_NAME).read_text(encoding="utf-8"))
        losses = [entry["loss"] - entry.get("anchor", 0.0) for entry in log]
        noted = self._seconds()
        before = sum(noted[part] for part in made)
        return [
            Point(
                folder,
                step,
                sum(losses[max(0, step - _LOSS_STEPS) : step]) / min(step, _LOSS_STEPS),
                before + noted[name] * step / self.plan.steps,
            )
            for step, folder in folders.items()
        ]

    def own_text(self, strength: float = 1.0) -> OwnTextAnchor:
        """The text of the base model as `run` makes it, with a strength."""
        if not self.folder.own_text.exists():
            start = time.process_time()
            stages.own_text_anchor(self.config, self.folder, self.inputs)
            self._note("own text", time.process_time() - start)
        made = OwnTextAnchor.load(self.folder.own_text)
        made.strength = strength
        return made

    def reads(self) -> ContrastiveReads:
        """Where an adapter reads that is kept to what is the training data's own."""
        own = self.own_text()
        config = replace(self.config, reads="contrastive")
        if not self.folder.reads.exists():
            start = time.process_time()
            stages.contrastive_reads(config, self.folder, self.inputs, own)
            self._note("reads", time.process_time() - start)
        return ContrastiveReads.load(self.folder.reads)

    def subspace(self, k: int = 2) -> Subspace:
        """The write directions of the naive adapter, `k` of them whatever the evidence."""
        from grasp_kernels.identification import identify

        path = self.root / f"subspace-{k}.safetensors"
        if not path.exists():
            self.curve("naive", early=True)
            identify(
                [str(folder) for folder in self.early.values()],
                k=k,
                generator=torch.Generator().manual_seed(self.task.seed),
                base_model=self.config.model,
            ).save(path)
        return Subspace.load(path)

    def _note(self, part: str, seconds: float) -> None:
        write_json(self.root / "seconds.json", {**self._seconds(), part: seconds})

    def _seconds(self) -> dict[str, float]:
        """Processor time of each part that was made here."""
        path = self.root / "seconds.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def forget(self, name: str) -> None:
        """Remove the adapters of a method, whose rows are written."""
        shutil.rmtree(self.root / name, ignore_errors=True)


# Twice the usual learning rate of this model (5e-4) trains in two thirds of the steps.
_TRAINING: dict[str, Any] = {
    "batch_size": 8,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant_with_warmup",
    "warmup": 10,
    "save_every": 48,
}
_IDENTIFY_STEPS = 200  # early checkpoints are parts of so many


def _record(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
