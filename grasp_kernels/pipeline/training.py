"""Checked inputs -> trained adapter folder, with `transformers.Trainer`.

Resumable: a stopped training goes on from its last complete checkpoint, and ends with the same
adapter as without the stop (to the bit on a deterministic device). This module imports
transformers, so `import grasp_kernels` does not import it.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from grasp_kernels import processes
from grasp_kernels.adapters.portable import fold_in_place
from grasp_kernels.config import Backend, GraspConfig
from grasp_kernels.data import collate
from grasp_kernels.files import room_for, whole_folder, write_json
from grasp_kernels.inert import reason
from grasp_kernels.models.checkpoint import load_model
from grasp_kernels.models.sharding import leave_to_ddp
from grasp_kernels.pipeline.config import RunConfig
from grasp_kernels.pipeline.folder import LOG_NAME
from grasp_kernels.pipeline.inputs import Inputs, attach_lora, warmup_steps
from grasp_kernels.pipeline.interrupts import raise_if_interrupted
from grasp_kernels.pipeline.trainer_options import as_typed, parse
from grasp_kernels.progress import bar, tell
from grasp_kernels.training.trainer import GraspTrainerMixin
from grasp_kernels.training.watch import Watch

if TYPE_CHECKING:
    from peft import PeftModel

    from grasp_kernels.regularizer import KLRegularizer
    from grasp_kernels.subspace import Subspace

_TIMED = 3  # steps
_MEASUREMENTS = 20  # of leakage in one training
_STATE = "trainer_state.json"
_WHOLE = "whole"  # written into a checkpoint after the files of all processes


class _Steps(TrainerCallback):
    """Show the steps in a progress bar, save the adapter after some, and end after the last.

    The end may come early, without a change of the learning rate schedule.
    """

    def __init__(
        self,
        shown: Any,
        snapshots: Mapping[int, Path],
        last: int,
        forecast: Callable[[float], str] | None,
    ) -> None:
        self.bar, self.snapshots, self.last, self.forecast = shown, snapshots, last, forecast
        self.ends: list[float] = []  # seconds

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar.initial = self.bar.n = state.global_step  # steps of an earlier process

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        folder = self.snapshots.get(state.global_step)
        if folder is not None and processes.index() == 0 and not folder.exists():
            save_adapter(kwargs["model"], folder)
        raise_if_interrupted()
        self._tell_time()
        control.should_training_stop = state.global_step >= self.last

    def _tell_time(self) -> None:
        """Say once how long it takes, from a few steps after the first."""
        self.ends.append(time.monotonic())
        if self.forecast is not None and len(self.ends) == 1 + _TIMED:
            tell(self.forecast((self.ends[-1] - self.ends[0]) / _TIMED))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)


class _Trainer(Trainer):
    """Load every checkpoint again after it is saved, so that a resume changes nothing.

    A closed layer trains `B` and saves `(I − V Vᵀ) B`. Without this step a resumed training would
    round differently from one that was never stopped.
    """

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        saved = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with room_for(saved):
            super()._save_checkpoint(model, trial)
        processes.wait()
        processes.from_first((saved / _WHOLE).touch)
        self._load_from_checkpoint(str(saved))

    def train_to(self, last_step: int, checkpoint: Path | None) -> None:
        """Train from the start, or from a checkpoint.

        From a checkpoint of the last step nothing is left to do; Trainer would take one more step.
        """
        if checkpoint is not None:
            self.state = TrainerState.load_from_json(str(checkpoint / _STATE))
            if self.state.global_step >= last_step:
                self._load_from_checkpoint(str(checkpoint))
                return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


class _Retrainer(GraspTrainerMixin, _Trainer):
    """Train on the fast layers, with the divergence from the base model."""


def train(
    config: RunConfig,
    inputs: Inputs,
    *,
    out: Path,
    work: Path,
    description: str,
    subspace: Subspace | None = None,
    kl_regularizer: KLRegularizer | None = None,
    snapshots: Mapping[int, Path] | None = None,
    last_step: int | None = None,
    forecast: Callable[[float], str] | None = None,
) -> None:
    """Train one adapter from the model's folder into `out`, whole or not at all.

    Without `subspace` and `kl_regularizer` it is the naive adapter, on peft's own layers.
    `subspace` projects the gradient, and `kl_regularizer` adds the divergence from the base model.
    Nothing else differs: initialisation, data order and dropout come from the seed.

    `work` keeps the checkpoints to resume from, and is removed at the end. `out` also gets
    `training_log.json`: a list of {"step", "loss", "learning_rate", ...}, one entry a step, with
    the divergence as `kl`.

    Args:
        snapshots: step -> folder for the adapter after that step.
        last_step: end after this step, before the end of the learning rate schedule.
        forecast: a sentence from the seconds of a step, which is said after a few steps.

    Raises:
        FloatingPointError: the loss or a gradient is not finite.
    """
    model = attach_lora(load_model(inputs.checkpoint, config.dtype), config, str(inputs.checkpoint))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    last_step = last_step or inputs.steps
    if processes.is_split():
        leave_to_ddp(model)
    with bar(total=last_step, desc=description, unit="step") as shown:
        options: dict[str, Any] = {
            "model": model,
            "args": training_arguments(config, inputs.steps, work),
            "train_dataset": inputs.train,
            "data_collator": partial(collate, pad_token_id=inputs.pad_token_id),
            "callbacks": [_Steps(shown, snapshots or {}, last_step, forecast)],
        }
        if subspace is None and kl_regularizer is None:
            trainer = _Trainer(**options)
            trainer.callback_handler.callbacks.insert(0, Watch())
        else:
            grasp = GraspConfig(
                subspace=subspace,
                orthogonal=config.orthogonal,
                backend=cast(Backend, config.backend),
                kl_coef=0.0,  # the chats have been made already
                measure_steps=max(1, inputs.steps // _MEASUREMENTS),
            )
            trainer = _Retrainer(**options, grasp_config=grasp, kl_regularizer=kl_regularizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train_to(last_step, processes.from_first(lambda: last_checkpoint(work)))
    entries = [dict(sorted(e.items())) for e in trainer.state.log_history if "loss" in e]
    folder = Path(config.model)  # or the name of a model on the hub
    base_name = str(folder.resolve()) if folder.is_dir() else config.model
    processes.from_first(partial(save_adapter, model, out, log=entries, base_name=base_name))
    processes.from_first(partial(shutil.rmtree, work, ignore_errors=True))
    del model, options, trainer
    gc.collect()  # trainer and callbacks refer to each other, and so keep the model alive


def save_adapter(
    model: PeftModel,
    out: Path,
    *,
    log: list[dict[str, Any]] | None = None,
    base_name: str | None = None,
) -> None:
    """Write the adapter as a peft folder, whole or not at all; rsLoRA as plain LoRA."""
    with whole_folder(out) as partial_folder:
        # "auto" would query the hub for a resized embedding, but no run resizes it.
        model.save_pretrained(str(partial_folder), save_embedding_layers=False)
        path = partial_folder / "adapter_config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(written["target_modules"], list):  # a set in peft, in random order
            written["target_modules"].sort()
        written["base_model_name_or_path"] = base_name or written["base_model_name_or_path"]
        write_json(path, written)
        if written["use_rslora"]:  # which not all software scales as peft does
            fold_in_place(partial_folder)
        if log is not None:
            write_json(partial_folder / LOG_NAME, log)


def last_checkpoint(work: Path) -> Path | None:
    """Return the newest complete checkpoint; remove those that were not finished."""
    checkpoints = sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    while checkpoints:
        newest = checkpoints.pop()
        if (newest / _WHOLE).exists():
            return newest
        shutil.rmtree(newest)
    return None


def check_trainer(config: RunConfig, steps: int) -> None:
    """Raise unless Trainer can make optimizer and schedule of the options, for a tiny model.

    Raises:
        ValueError: options that cannot be used here, and the reason.
    """
    try:
        with TemporaryDirectory() as work:
            arguments = training_arguments(config, steps, Path(work))
            Trainer(nn.Linear(1, 1), arguments).create_optimizer_and_scheduler(steps)
    except Exception as error:
        given = dict(config.training_arguments)
        if not given or config.lr_scheduler_type != RunConfig.lr_scheduler_type:
            given = {"lr_scheduler_type": config.lr_scheduler_type, **given}
        named = " and ".join(f"{name} = {value!r}" for name, value in given.items())
        said = reason(ValueError(error))  # for a TypeError of transformers too
        raise ValueError(f"{named} cannot be used here ({said}): change or omit it.") from error


def training_arguments(config: RunConfig, steps: int, work: Path) -> TrainingArguments:
    """Return the options of a run as options of `transformers.Trainer`."""
    typed = [as_typed(*option) for option in config.training_arguments.items()]
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=warmup_steps(config, steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss that has to stop the training
        save_steps=config.save_steps or max(1, math.ceil(steps / 10)),
        save_total_limit=2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        **{"optim": "adamw_torch", **parse(list(chain(*typed)))},
    )
    if on_gpu:
        # Trainer wraps the model in nn.DataParallel if it sees several GPUs; a run uses one.
        arguments._n_gpu = 1
    return arguments
