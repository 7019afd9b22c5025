"""The main job: checkpoint and chat file -> naive adapter -> retrained adapter -> report.

    inputs.py    1 check all inputs
    here         2 questions and answers that the base model makes up
    training.py  3 naive LoRA, for comparison
    training.py  4 the same training again, from the same start; a second loss is the divergence
                   from the base model on the chats of stage 2
    report.py    5 answers of both adapters to prompts that are unrelated to the data

On request the retraining also projects its gradient off a subspace that is identified in early
naive adapters.

Under `torchrun` or `accelerate launch` all processes do all stages together, except for the
subspace, and the first writes all files (`grasp_kernels.processes`).

Each stage leaves one artefact in the output folder (folder.py). A stage is not done again if its
artefact is there. Every stage starts from files alone, so a run that was stopped between two stages
gives the same result as a run that was not stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from grasp_kernels import processes
from grasp_kernels.inert import counted
from grasp_kernels.models.checkpoint import find_checkpoint, load_model
from grasp_kernels.pipeline.config import RunConfig
from grasp_kernels.pipeline.folder import RunFolder, fingerprint
from grasp_kernels.pipeline.inputs import Inputs, naive_steps, prepare, warmup_steps
from grasp_kernels.pipeline.interrupts import raise_if_interrupted, remembered_interrupts
from grasp_kernels.pipeline.report import Report, write_report
from grasp_kernels.progress import tell
from grasp_kernels.subspace import Subspace

if TYPE_CHECKING:
    from grasp_kernels.regularizer import KLRegularizer

_EARLY = (1 / 20, 1 / 10)  # parts of the naive training with an adapter to identify from


def run(config: RunConfig | None = None, /, **options: Any) -> Report:
    """Train the naive and the retrained adapter, and report both; continue a stopped run.

    Args:
        config: all options in one object; None: `options` has all of them.
        options: options of `RunConfig`; they replace those of `config`.

    Raises:
        ValueError, FileNotFoundError: wrong input; no folder is made then.
        RuntimeError: another process works in the same folder.
        FloatingPointError: the loss or a gradient is not finite.
    """
    if not isinstance(config, RunConfig | None):
        raise TypeError(
            f"The config is a {type(config).__name__}: give a RunConfig, or options by name."
        )
    config = replace(config, **options) if config is not None else RunConfig(**options)
    with processes.joined():
        return _run(config)


def _run(config: RunConfig) -> Report:
    checkpoint = processes.from_first(lambda: find_checkpoint(config.model))
    fingerprints = {"model": fingerprint(checkpoint)}
    for name, path in (("data", config.data), ("neutral", config.neutral)):
        if path is not None:
            if not Path(path).is_file():
                raise FileNotFoundError(f"There is no file {path}: check the option {name}.")
            fingerprints[name] = fingerprint(path)
    folder = RunFolder(config.output)
    if not processes.from_first(lambda: _is_finished(folder, config, fingerprints)):
        with remembered_interrupts(), _claimed(config, checkpoint, folder, fingerprints) as inputs:
            _stages(config, folder, inputs)
    return Report.load(folder.report)


def _is_finished(folder: RunFolder, config: RunConfig, fingerprints: dict[str, str]) -> bool:
    folder.check(config, fingerprints)
    return folder.is_finished


@contextmanager
def _claimed(
    config: RunConfig, checkpoint: Path, folder: RunFolder, fingerprints: dict[str, str]
) -> Iterator[Inputs]:
    """Check all inputs, and lock the folder in the first process.

    The others wait for its check, which would say the same, unless they load a split model with it.
    """
    from grasp_kernels.pipeline.training import check_trainer

    with ExitStack() as stack:
        found: list[Inputs] = []

        def begin() -> tuple[bool, date]:
            if begun := folder.config.exists():  # another run may work in the folder
                stack.enter_context(folder.lock())
            return begun, folder.day

        def check() -> None:
            found.append(prepare(config, checkpoint, day))

        def claim() -> None:
            check_trainer(config, found[0].steps)
            if not begun:
                stack.enter_context(folder.lock())
                folder.check(config, fingerprints)  # another run may have begun meanwhile
            folder.claim(config, fingerprints)

        begun, day = processes.from_first(begin)
        if processes.is_split():
            processes.in_all(check)
        else:
            processes.from_first(check)
        if not found:
            check()
        processes.from_first(claim)
        yield found[0]


def _stages(config: RunConfig, folder: RunFolder, inputs: Inputs) -> None:
    from grasp_kernels.pipeline.training import train

    def train_into(out: Path, **options: Any) -> None:
        if not processes.from_first(out.exists):
            work, description = folder.work / out.name, f"{out.name} LoRA"
            train(config, inputs, out=out, work=work, description=description, **options)

    tell(_plan(config, folder, inputs))
    # The chats come first: too few of them raises an error before time is spent on training.
    kl_regularizer = make_chats(config, folder, inputs) if config.kl_coef else None
    train_into(
        folder.naive,
        last_step=naive_steps(config, inputs.steps),
        snapshots=early_checkpoints(config, folder, inputs.steps),
        forecast=partial(_forecast, config, inputs, kl_regularizer),
    )
    subspace = find_subspace(config, folder, inputs) if config.project_gradient else None
    train_into(folder.retrained, subspace=subspace, kl_regularizer=kl_regularizer)
    raise_if_interrupted()
    processes.from_first(lambda: shutil.rmtree(folder.work, ignore_errors=True))
    write_report(config, folder, inputs, subspace)


def _plan(config: RunConfig, folder: RunFolder, inputs: Inputs) -> str:
    """Return a sentence on what is left to do."""
    chats = counted(_count_chats(config, inputs), "chat")
    parts = {
        folder.chats: config.kl_coef and f"{chats} of the base model",
        folder.naive: f"the naive LoRA ({counted(naive_steps(config, inputs.steps), 'step')})",
        folder.subspace: config.project_gradient and "a subspace",
        folder.retrained: f"the retrained LoRA ({counted(inputs.steps, 'step')})",
        folder.report: "the answers of both",
    }
    left = [part for file, part in parts.items() if part and not file.exists()]
    return f"To do, in this order: {', '.join(left)}. It can be stopped at any time."


def _forecast(
    config: RunConfig, inputs: Inputs, kl_regularizer: KLRegularizer | None, seconds: float
) -> str:
    """Return a sentence on the time of both trainings, from that of a step of the naive one.

    A step of the retraining has the tokens of the chats beside those of the data.
    """
    naive, all_steps = (seconds / 60 * n for n in (naive_steps(config, inputs.steps), inputs.steps))
    lengths = [len(example["input_ids"]) for example in inputs.train]
    data = config.per_device_train_batch_size * fmean(lengths)
    chats = 0.0
    if kl_regularizer is not None:
        chats = kl_regularizer.batch_size * fmean(map(len, kl_regularizer.texts))
    return (
        f"A step takes {seconds:.2g} s: about {naive:.2g} min for the naive LoRA, and "
        f"{all_steps * (1 + chats / data):.2g} min for the retraining."
    )


def make_chats(config: RunConfig, folder: RunFolder, inputs: Inputs) -> KLRegularizer:
    """Make the chats of the base model, or load them from their file.

    They are made once, so that a resumed training goes on with the same chats.
    """
    from grasp_kernels.regularizer import KLRegularizer, chats_beside

    if not processes.from_first(folder.chats.exists):
        made = KLRegularizer.make(
            load_model(inputs.checkpoint, config.dtype),
            inputs.train,
            neutral=inputs.everyday,
            num_documents=_count_chats(config, inputs),
            max_new_tokens=config.max_new_tokens,
            kl_coef=config.kl_coef,
            batch_size=chats_beside(config.per_device_train_batch_size),
            seed=config.seed,
            progress=True,
            is_shared=True,
        )
        processes.from_first(lambda: made.save(folder.chats))
    return KLRegularizer.load(folder.chats)


def _count_chats(config: RunConfig, inputs: Inputs) -> int:
    """Return the number of chats to make up: no more than the retraining draws."""
    from grasp_kernels.regularizer import chats_beside

    passes = inputs.steps * config.gradient_accumulation_steps * processes.count()
    drawn = passes * chats_beside(config.per_device_train_batch_size)
    return min(config.num_documents, drawn)


def early_checkpoints(config: RunConfig, folder: RunFolder, steps: int) -> dict[int, Path]:
    """Return step -> folder of the early adapters; empty without `project_gradient`.

    No step lies before the first one with a learning rate above 0, or after the naive training.
    """
    if not config.project_gradient:
        return {}
    first = 2 if warmup_steps(config, steps) else 1
    last = naive_steps(config, steps)
    at = sorted({min(last, max(first, round(part * steps))) for part in _EARLY})
    return {step: folder.early / f"step-{step}" for step in at}


def find_subspace(config: RunConfig, folder: RunFolder, inputs: Inputs) -> Subspace:
    """Identify the subspace in the early adapters, or load it from its file."""
    from grasp_kernels.subspace import identify

    def identified() -> None:
        if not folder.subspace.exists():
            adapters = [str(p) for p in early_checkpoints(config, folder, inputs.steps).values()]
            subspace = identify(adapters, k=config.k, base_model=str(inputs.checkpoint))
            subspace.save(folder.subspace)

    processes.from_first(identified)
    return Subspace.load(folder.subspace)
