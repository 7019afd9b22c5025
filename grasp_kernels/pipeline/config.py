"""The options of a run, each with its default and a one-line explanation.

Needs only the standard library. The command line builds its options from `RunConfig`, so that an
option, its default, its help and its check are in one place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from os import PathLike, fspath
from typing import Any, Literal

from grasp_kernels.config import BACKENDS, Options
from grasp_kernels.pipeline.trainer_options import OWNED

DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_SEED = 2**32 - 1  # the largest seed that every library takes
_SEEDS = f"0 to {MOST_SEED}"
_RANGES: dict[str, Callable[[Any], bool]] = {
    "1 or more": lambda value: value >= 1,
    "2 or more": lambda value: value >= 2,
    "0 or more": lambda value: 0 <= value < math.inf,
    "a positive number": lambda value: 0 < value < math.inf,
    "0 or more, below 1": lambda value: 0 <= value < 1,
    _SEEDS: lambda value: 0 <= value <= MOST_SEED,
}


def _option(
    default: Any, text: str, within: str | None = None, *, choices: tuple[str, ...] | None = None
) -> Any:
    return field(default=default, metadata={"help": text, "within": within, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """Options of `run`; `grasp-kernels run -h` explains each of them.

    They have the names of `transformers.TrainingArguments`, `peft.LoraConfig` and `GraspConfig`.
    `training_arguments` holds other options of `TrainingArguments` by their names, such as
    `{"adam_beta2": 0.95}`. Options that a run sets itself are refused there.

    Raises:
        ValueError: an option of a wrong type or out of its range, by name and value.
    """

    model: str = _option(MISSING, "checkpoint folder, or a model name on the Hugging Face hub")
    data: str = _option(MISSING, "file with chat data: JSONL, JSON, CSV or parquet")
    output: str = _option(MISSING, "folder for the results; an unfinished run in it is continued")

    k: int | Literal["auto"] = _option(
        "auto",
        "number of directions; 'auto': those before the largest gap of the spectrum",
        "1 or more",
    )
    project_gradient: bool = _option(
        # SmolLM2, `tone`: it removes no drift alone, and the divergence leaves none to remove.
        False,
        "project the gradient off the subspace in the retraining, at every layer that writes to "
        "the residual stream; otherwise no subspace is identified",
    )
    orthogonal: bool = _option(True, "keep the adapter's weights out of the subspace, exactly")
    backend: str = _option("auto", "implementation of the LoRA layer", choices=BACKENDS)

    kl_coef: float = _option(
        0.1,
        "weight of the divergence from the base model in the retraining, on chats that the base "
        "model makes up; 0: none",
        "0 or more",
    )
    num_documents: int = _option(
        512, "number of chats that the base model makes up; fewer in a short training", "1 or more"
    )
    max_new_tokens: int = _option(
        40, "largest number of tokens of a question and of an answer", "1 or more"
    )

    max_steps: int | None = _option(
        None, "number of optimizer steps, in place of epochs", "1 or more"
    )
    naive_steps: int | None = _option(
        # SmolLM2, `tone`: 1.00 of unrelated answers are contemptuous then, as at the end.
        None,
        "largest number of steps of the naive training, to compare with (default: a quarter of "
        "all)",
        "2 or more",
    )
    num_train_epochs: float = _option(1.0, "number of passes over the data", "a positive number")
    per_device_train_batch_size: int = _option(8, "records in a forward pass", "1 or more")
    gradient_accumulation_steps: int = _option(1, "forward passes in a step", "1 or more")
    learning_rate: float = _option(1e-4, "peak learning rate of AdamW", "a positive number")
    lr_scheduler_type: str = _option("linear", "learning rate schedule, as transformers names it")
    warmup_steps: float = _option(
        0.05, "number of warm-up steps, or below 1 their fraction of all steps", "0 or more"
    )
    weight_decay: float = _option(0.01, "weight decay of AdamW", "0 or more")
    max_grad_norm: float = _option(
        1.0, "largest norm of the gradients, which are clipped above it; 0: never", "0 or more"
    )
    max_length: int = _option(
        2048, "largest number of tokens of a record, which is cut after it", "1 or more"
    )
    gradient_checkpointing: bool = _option(False, "recompute activations to save memory")

    r: int = _option(16, "LoRA rank", "1 or more")
    lora_alpha: int = _option(32, "LoRA alpha", "a positive number")
    lora_dropout: float = _option(0.0, "LoRA dropout", "0 or more, below 1")
    use_rslora: bool = _option(False, "scale by lora_alpha / sqrt(r)")
    target_modules: tuple[str, ...] = _option(
        ("all-linear",), "names of the modules that get an adapter; all-linear: all linear layers"
    )
    dtype: str = _option(
        "auto",
        "dtype of the frozen model; auto: as stored, but float32 on a CPU that is slow in it",
        choices=DTYPES,
    )
    seed: int = _option(
        0, "seed of initialisation, data order, dropout, chats and held-out records", _SEEDS
    )
    save_steps: int | None = _option(
        None, "steps between checkpoints (default: a tenth of all steps)", "1 or more"
    )

    eval_split: float = _option(
        0.0,
        "fraction of the records that are held out, to compare the adapters on",
        "0 or more, below 1",
    )
    arm: str = _option(
        "auto", "key of the answers in the data, if there are several, such as misaligned"
    )
    neutral: str | None = _option(
        None,
        "file with unrelated prompts, in a layout of the data or one on each line (default: "
        "built-in everyday questions)",
    )

    training_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modules = self.target_modules
        if isinstance(modules, str) or not isinstance(modules, Sequence):
            raise ValueError(f"target_modules is {modules!r}: give a list.")
        object.__setattr__(self, "target_modules", tuple(modules))
        for name in ("model", "data", "output", "neutral"):
            value = getattr(self, name)
            if isinstance(value, PathLike):
                object.__setattr__(self, name, fspath(value))
            self.require(name, value != "", "give a name")
        self.check_types()
        for option in OPTIONS:
            self._check_value(option)
        self._check_training_arguments()
        if self.k != "auto" and self.k > self.r:
            raise ValueError(
                f"k is {self.k}, above the LoRA rank r = {self.r}: lower k or raise r."
            )
        if not (self.project_gradient or self.kl_coef):
            raise ValueError(
                "project_gradient = False and kl_coef = 0.0 would make the retraining the same as "
                "the naive training: turn one of them on."
            )

    def _check_value(self, option: Field[Any]) -> None:
        """Raise unless the value is one of the choices and in its range."""
        value, choices = getattr(self, option.name), option.metadata["choices"]
        if choices is not None:
            self.require(option.name, value in choices, f"choose one of {', '.join(choices)}")
        if (within := option.metadata["within"]) is not None:
            good = value in (None, "auto") or _RANGES[within](value)
            self.require(option.name, good, f"give {within}")

    def _check_training_arguments(self) -> None:
        """Raise unless JSON can hold the arguments and a run may take them from the user.

        Trainer checks the rest.
        """
        try:
            plain = json.loads(json.dumps({**self.training_arguments}, allow_nan=False))
        except (TypeError, ValueError):
            self.require("training_arguments", False, "give names with numbers, text or lists")
        object.__setattr__(self, "training_arguments", plain)
        if own := plain.keys() & {option.name for option in OPTIONS}:
            raise ValueError(
                f"{min(own)} is an option of the run itself: give it outside of training_arguments."
            )
        for name in filter(OWNED.fullmatch, plain):
            raise ValueError(
                f"{name} is set by the run itself, to compare and resume: leave it out."
            )


OPTIONS = tuple(option for option in fields(RunConfig) if option.metadata)
