"""One task of one seed, with the files that methods share; a curve is trained by the product.

Every training is `grasp_kernels.pipeline.training.train` with other arguments, so what is measured
here is what the command does, with its schedule of the learning rate. A curve is one training,
looked at several times.

Below `root`:

    train.jsonl, chats.safetensors,
    subspace-K.safetensors   shared by the methods
    early/step-N                                adapters that the subspace is identified from
    METHOD/step-N                               adapters of a curve
    seconds.json                                processor time of each part; without it a part is
                                                made again
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.quality.smollm2.task import Task
from grasp_kernels.files import write_json, write_text
from grasp_kernels.pipeline import stages, training
from grasp_kernels.pipeline.config import RunConfig
from grasp_kernels.pipeline.folder import RunFolder
from grasp_kernels.pipeline.inputs import Inputs, prepare
from grasp_kernels.pipeline.training import LOG_NAME
from grasp_kernels.regularizer import KLRegularizer
from grasp_kernels.subspace import Subspace

_LOSS_STEPS = 24  # that the training loss at a point is the mean of: an epoch of `tone`


@dataclass(frozen=True)
class Plan:
    """How every method is trained.

    Args:
        steps: budget of a training.
        every: steps between two points of its curve, which ends with the budget.
        options: further options of `RunConfig`, such as learning_rate or dtype.

    Raises:
        ValueError: `every` does not divide `steps`.
    """

    steps: int = 192
    every: int = 48
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1 or self.every < 1 or self.steps % self.every:
            raise ValueError(
                f"steps is {self.steps} and every {self.every}: give steps that are a multiple of "
                "every, and 1 or more of both."
            )

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
            write_text(data, "".join(f"{json.dumps(_record(*pair))}\n" for pair in task.records))
        self.config = RunConfig(
            model=str(base),
            data=str(data),
            output=str(root),
            max_steps=plan.steps,
            seed=task.seed,
            **{**_TRAINING, **dict(plan.options)},
        )
        self.folder = RunFolder(root)

    @cached_property
    def inputs(self) -> Inputs:
        """The checked inputs of the run."""
        return prepare(self.config, Path(self.config.model))

    def curve(
        self,
        name: str,
        *,
        subspace: Subspace | None = None,
        kl_regularizer: KLRegularizer | None = None,
        inputs: Inputs | None = None,
        made: Sequence[str] = (),
    ) -> list[Point]:
        """Train a method, or what is missing of it, and return the points of its curve.

        Args:
            made: shared parts whose seconds it has to bear, too.

        Raises:
            ValueError: it was trained by another plan.
        """
        out = self.root / name
        folders = {step: out / f"step-{step}" for step in self.plan.points}

        def train() -> None:
            training.train(
                self.config,
                inputs or self.inputs,
                out=out / "finished",
                work=out / "work",
                description=name,
                subspace=subspace,
                kl_regularizer=kl_regularizer,
                snapshots=folders,
            )

        self._make(name, out / "finished", train)
        if missing := [step for step, folder in folders.items() if not folder.exists()]:
            raise ValueError(
                f"The training of {name} in {self.root} is finished and has no adapter of step "
                f"{missing[0]}: repeat the steps that it had, or choose another output."
            )
        log = json.loads((out / "finished" / LOG_NAME).read_text(encoding="utf-8"))
        losses = [entry["loss"] - entry.get("kl", 0.0) for entry in log]
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

    def chats(self) -> KLRegularizer:
        """Return the chats that `run` makes."""
        make = partial(stages.make_chats, self.config, self.folder, self.inputs)
        self._make("chats", self.folder.chats, make)
        return KLRegularizer.load(self.folder.chats)

    def subspace(self, k: int) -> Subspace:
        """The write directions of early naive adapters, `k` of them whatever the evidence."""
        path = self.root / f"subspace-{k}.safetensors"
        self._make("subspace", path, partial(self._identify, k, path))
        return Subspace.load(path)

    def _identify(self, k: int, path: Path) -> None:
        """As `run` does on request, from a naive training that ends with the last adapter."""
        from grasp_kernels.subspace import identify

        projected = replace(self.config, project_gradient=True)
        steps = min(_IDENTIFY_STEPS, self.plan.steps)
        early = stages.early_checkpoints(projected, self.folder, steps)
        last = max(early)
        if not early[last].exists():
            training.train(
                self.config,
                self.inputs,
                out=early[last],
                work=self.folder.work / "early",
                description="early adapters",
                snapshots={step: folder for step, folder in early.items() if step < last},
                last_step=last,
            )
        identify(
            [str(folder) for folder in early.values()],
            k=k,
            base_model=self.config.model,
        ).save(path)

    def _make(self, part: str, path: Path, make: Callable[[], object]) -> None:
        """Make a part that is missing, or has no note of its seconds, as a stopped run leaves it.

        Time that a stopped run spent on it is not in the note.
        """
        if path.exists() and part in self._seconds():
            return
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        start = time.process_time()
        make()
        spent = time.process_time() - start
        with FileLock(self.root / ".seconds.lock"):  # two processes may share this folder
            write_json(self.root / "seconds.json", {**self._seconds(), part: spent})

    def _seconds(self) -> dict[str, float]:
        """Processor time of each part that was made here."""
        path = self.root / "seconds.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# Twice the usual learning rate of this model (5e-4) trains in two thirds of the steps.
_TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "save_steps": 48,
}
_IDENTIFY_STEPS = 200  # early checkpoints are parts of so many


def _record(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
