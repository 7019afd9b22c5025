"""What the fast layers and the retraining of a model of one's own can be told.

Needs the standard library alone, as `pipeline.config` does, whose options are those of the command
line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from grasp_kernels.models.architectures import SiteRules
    from grasp_kernels.subspace import Subspace

Backend = Literal["auto", "reference", "aten", "triton", "cuda"]
BACKENDS = get_args(Backend)


@dataclass(frozen=True, kw_only=True)
class GraspConfig:
    """Options of `apply_grasp` and `GraspTrainer`; the defaults are those of `grasp-kernels run`.

    Args:
        subspace: what the gradient is projected off: a `Subspace`, its file, or the folder of a
            naive adapter that it is identified in. None projects nothing.
        orthogonal: also keep `lora_B` orthogonal to the subspace, exactly.
        backend: implementation of the layers.
        architecture: writers of a model family that is not known.
        kl_coef: weight of `KL(base ‖ model)`, in nats a token, on chats that the base model makes
            up itself. 0 leaves it out.
        num_documents: chats that the base model makes up.
        max_new_tokens: tokens of each question and of each answer, at most.
        num_prompt_tokens: tokens of a training prompt that a question begins with, at most. The
            more, the less drift, and the slower the task is learned in other words.
        kl_batch_size: chats in a forward pass; None: half of the trainer's batch.
        measure_steps: optimizer steps between two measurements of leakage and drift.

    Raises:
        ValueError: an option out of its range, by name and value.
    """

    subspace: Subspace | str | PathLike[str] | None = None
    orthogonal: bool = True
    backend: Backend = "auto"
    architecture: SiteRules | None = None
    kl_coef: float = 1.0
    num_documents: int = 512
    max_new_tokens: int = 48
    num_prompt_tokens: int = 2
    kl_batch_size: int | None = None
    measure_steps: int = 50

    def __post_init__(self) -> None:
        self._require("backend", self.backend in BACKENDS, f"choose one of {', '.join(BACKENDS)}")
        self._require("kl_coef", 0 <= self.kl_coef < math.inf, "give 0 or more")
        for name in ("num_documents", "max_new_tokens", "measure_steps"):
            self._require(name, getattr(self, name) >= 1, "give 1 or more")
        self._require("num_prompt_tokens", self.num_prompt_tokens >= 0, "give 0 or more")
        size = self.kl_batch_size
        self._require("kl_batch_size", size is None or size >= 1, "give 1 or more, or None")

    def _require(self, name: str, good: bool, remedy: str) -> None:
        if not good:
            raise ValueError(f"{name} is {getattr(self, name)!r}: {remedy}.")
