"""Everything a run can be told, with its default and its one-line explanation.

Needs the standard library alone: the command line builds its options from `RunConfig`, so that an
option, its default, its help and its check stand in one place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from typing import Any, Literal

from grasp_kernels.config import BACKENDS

READS = ("contrastive", "free")
ANCHORS = ("own-text", "none")
PROJECTS = ("none", "residual")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_SEED = 2**32 - 1  # that every library takes
_TYPES: dict[str, tuple[Any, str]] = {
    "str": (str, "a name"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "True or False"),
}


def _option(default: Any, text: str, *, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


def _required(text: str) -> Any:
    return field(metadata={"help": text, "choices": None})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of `grasp_kernels.pipeline.stages.run`; `grasp-kernels run -h` lists the same.

    Raises:
        ValueError: an option out of its range, by name and value.
    """

    model: str = _required("checkpoint folder, or a model name on the Hugging Face hub")
    data: str = _required("file with chat data: JSONL, JSON, CSV or parquet")
    output: str = _required("folder of this run; an unfinished run in it goes on")

    k: int | Literal["auto"] = _option(
        "auto", "number of directions, or 'auto': up to the largest gap"
    )
    early_checkpoints: tuple[float, ...] = _option(
        # Drift as a part of the naive one in the demo's world, mean of 5 seeds (4 for the last):
        # identified after 1/20 of the steps .62, after 1/8 .68, from 1/16, 1/8 and 1/4 .68.
        (1 / 20, 1 / 10),
        "parts of the naive training after which its adapter is saved to identify from; "
        "1 is the finished adapter",
    )

    project: str = _option(
        # SmolLM2, `tone`: beside own text no drift is left to take; alone it takes none.
        "none",
        "what the retraining projects off the subspace: the gradient of the residual stream where "
        "layers write to it, or nothing, and then none is identified",
        choices=PROJECTS,
    )
    closed: bool = _option(True, "keep the adapter's own weights out of the subspace, exactly")
    backend: str = _option("auto", "implementation of the LoRA layer", choices=BACKENDS)

    reads: str = _option(
        "free",
        "where the adapter of the retraining reads: fixed where the training text has most, "
        "relative to text that the base model makes up itself, or free",
        choices=READS,
    )
    anchor: str = _option(
        "own-text",
        "where the retraining stays at the base model: on its own answers to questions that it "
        "makes up itself (less what looks like the training data), or nowhere",
        choices=ANCHORS,
    )
    anchor_strength: float = _option(1.0, "weight of the divergence from the base model there")
    own_documents: int = _option(512, "questions and answers that the base model makes up itself")
    own_length: int = _option(48, "tokens of each question and of each answer, at most")
    own_begun: int = _option(
        # SmolLM2, `tone`, 144 steps, task / drift: 0 .98 / .09, 4 .73 / .02, naive .98 / 1.00.
        2,
        "tokens of a training prompt that a question begins with, at most: the more, the less "
        "drift, and the slower the task is learned in other words",
    )

    steps: int | None = _option(None, "optimizer steps; overrides epochs")
    epochs: float = _option(1.0, "passes over the data")
    batch_size: int = _option(8, "records in a forward pass")
    gradient_accumulation: int = _option(1, "forward passes in an optimizer step")
    learning_rate: float = _option(1e-4, "peak learning rate of AdamW")
    lr_scheduler: str = _option("linear", "learning rate schedule, by its name in transformers")
    warmup: float = _option(0.05, "warm-up steps (1 or more), or their part of all steps (below 1)")
    weight_decay: float = _option(0.01, "weight decay of AdamW")
    max_grad_norm: float = _option(1.0, "gradients are clipped at this norm; 0: never")
    max_length: int = _option(2048, "records are cut at this number of tokens")
    gradient_checkpointing: bool = _option(False, "recompute activations to save memory")

    rank: int = _option(16, "LoRA rank")
    alpha: int = _option(32, "LoRA alpha")
    dropout: float = _option(0.0, "LoRA dropout")
    rslora: bool = _option(False, "scale by alpha / sqrt(rank)")
    target_modules: tuple[str, ...] = _option(
        ("all-linear",), "names of the modules that get an adapter, or all-linear"
    )
    dtype: str = _option(
        "auto", "of the frozen model; auto: as stored, float32 on a slow CPU", choices=DTYPES
    )
    seed: int = _option(0, "seed of initialisation, data order, dropout and every random test")
    save_every: int | None = _option(None, "steps between checkpoints; default: a tenth of all")

    eval_split: float = _option(0.0, "part of the records held out to compare both adapters on")
    arm: str = _option(
        "auto", "key of the answers in the data, where there are several, such as misaligned"
    )
    neutral: str | None = _option(
        None, "file of neutral prompts, as data or one a line; default: a few built-in ones"
    )

    def __post_init__(self) -> None:
        for name in ("early_checkpoints", "target_modules"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"{name} is {value!r}: give a list.")
            object.__setattr__(self, name, tuple(value))
        for name in ("model", "data", "output", "neutral"):
            value = getattr(self, name)
            if isinstance(value, PathLike):
                object.__setattr__(self, name, fspath(value))
            self._require(name, value != "", "give a name")
        self._check_choices()
        self._check_types()
        self._check_numbers()
        self._check_k()
        if not (self.is_projected or self.needs_own_text):
            raise ValueError(
                f"project = {self.project!r}, reads = {self.reads!r} and anchor = {self.anchor!r} "
                "would make the retraining the naive one again: turn one of them on."
            )

    @property
    def is_projected(self) -> bool:
        """Whether the retraining has a subspace."""
        return self.project != "none"

    @property
    def needs_own_text(self) -> bool:
        """Whether the retraining uses text of the base model."""
        return self.reads == "contrastive" or self.anchor == "own-text"

    def _check_choices(self) -> None:
        for option in fields(self):
            choices, value = option.metadata["choices"], getattr(self, option.name)
            if choices is not None and value not in choices:
                raise ValueError(f"{option.name} is {value!r}: choose one of {', '.join(choices)}.")

    def _check_types(self) -> None:
        for option in fields(self):
            value, said = getattr(self, option.name), str(option.type)
            types, wanted = _TYPES[re.findall(r"str|int|float|bool", said)[0]]
            others = (None,) * ("None" in said) + ("auto",) * ("Literal" in said)
            wanted = f"'auto' or {wanted}" if "auto" in others else wanted
            for one in value if isinstance(value, tuple) else (value,):
                fits = isinstance(one, types) and isinstance(one, bool) == (types is bool)
                self._require(option.name, fits or one in others, f"give {wanted}")

    def _check_numbers(self) -> None:
        counts = ("batch_size", "gradient_accumulation", "max_length", "rank")
        for name in (*counts, "own_documents", "own_length"):
            self._require(name, getattr(self, name) >= 1, "give 1 or more")
        for name in ("steps", "save_every"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "give 1 or more")
        for name in ("epochs", "learning_rate", "alpha"):
            value = getattr(self, name)
            self._require(name, 0 < value < math.inf, "give a positive number")
        self._require("seed", 0 <= self.seed <= MOST_SEED, f"give 0 to {MOST_SEED}")
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "give 0 or more")
        for name in ("anchor_strength", "own_begun"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "give 0 or more")
        for name in ("dropout", "eval_split"):
            self._require(name, 0 <= getattr(self, name) < 1, "give 0 or more, below 1")
        parts = self.early_checkpoints
        self._require("early_checkpoints", all(0 < p <= 1 for p in parts), "give parts in (0, 1]")
        self._require("early_checkpoints", len(parts) > 0, "give at least one part in (0, 1]")

    def _check_k(self) -> None:
        if self.k != "auto":
            self._require("k", isinstance(self.k, int) and self.k >= 1, "give 'auto' or 1 or more")
        if isinstance(self.k, int) and self.k > self.rank:
            raise ValueError(
                f"k is {self.k}, above the LoRA rank {self.rank}: lower k or raise the rank."
            )

    def _require(self, name: str, good: bool, remedy: str) -> None:
        if not good:
            raise ValueError(f"{name} is {getattr(self, name)!r}: {remedy}.")
