"""Options of the fast layers and of the retraining.

Needs the standard library alone, as does `pipeline.config`, with the options of the command line.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from grasp_kernels.models.architectures import SiteRules
    from grasp_kernels.subspace import Subspace

Backend = Literal["auto", "reference", "aten", "triton", "cuda"]
BACKENDS = get_args(Backend)
_TYPES: dict[str, tuple[Any, str]] = {
    "str": (str, "a name"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "True or False"),
}
_PLAIN = re.compile(
    r"(tuple\[)?(?P<type>str|int|float|bool)(, \.\.\.\])?"
    r"(?P<auto> \| Literal\['auto'\])?(?P<none> \| None)?"
)


class Options:
    """Check the options of a dataclass; an error names the option, its value and a remedy."""

    def check_types(self) -> None:
        """Compare the values of options of the plain types with their annotations.

        Raises:
            ValueError: a value of another type.
        """
        for option in fields(self):  # type: ignore[arg-type]
            plain = _PLAIN.fullmatch(str(option.type))
            if plain is None:
                continue
            value, (types, wanted) = getattr(self, option.name), _TYPES[plain["type"]]
            others = (None,) * bool(plain["none"]) + ("auto",) * bool(plain["auto"])
            wanted = f"'auto' or {wanted}" if plain["auto"] else wanted
            for one in value if isinstance(value, tuple) else (value,):
                fits = isinstance(one, types) and isinstance(one, bool) == (types is bool)
                self.require(option.name, fits or one in others, f"give {wanted}")

    def require(self, name: str, good: bool, remedy: str) -> None:
        """Refuse the value of an option unless it is good."""
        if not good:
            raise ValueError(f"{name} is {getattr(self, name)!r}: {remedy}.")


@dataclass(frozen=True, kw_only=True)
class GraspConfig(Options):
    """Options of `apply_grasp` and `GraspTrainer`.

    The defaults are those of `grasp-kernels run`.

    Args:
        subspace: the subspace that the gradient is projected off: a `Subspace`, its file, or the
            folder of a naive adapter to `identify` it in. None projects nothing.
        orthogonal: also keep `lora_B` orthogonal to the subspace, exactly.
        backend: implementation of the layers.
        sites: the writers, for an unknown architecture.
        kl_coef: weight of `KL(base ‖ model)`, in nats a token, on chats invented by the base model.
            0 leaves the term out.
        num_documents: number of chats invented by the base model.
        max_new_tokens: tokens of each question and of each answer, at most.
        kl_batch_size: chats in a forward pass; None: a quarter of the trainer's batch.
        measure_steps: optimizer steps between two measurements of leakage.

    Raises:
        ValueError: an option out of its range, by name and value.
    """

    subspace: Subspace | str | PathLike[str] | None = None
    orthogonal: bool = True
    backend: Backend = "auto"
    sites: SiteRules | None = None
    kl_coef: float = 0.1
    num_documents: int = 512
    max_new_tokens: int = 40
    kl_batch_size: int | None = None
    measure_steps: int = 50

    def __post_init__(self) -> None:
        self.check_types()
        subspace, size = self.subspace, self.kl_batch_size
        is_path = isinstance(subspace, str | PathLike) and subspace != ""
        known = subspace is None or is_path or hasattr(subspace, "basis")
        remedy = "give a Subspace, its file or the folder of an adapter, or None"
        self.require("subspace", known, remedy)
        has_writers = self.sites is None or hasattr(self.sites, "writers")
        self.require("sites", has_writers, "give SiteRules or None")
        self.require("backend", self.backend in BACKENDS, f"choose one of {', '.join(BACKENDS)}")
        self.require("kl_coef", 0 <= self.kl_coef < math.inf, "give 0 or more")
        for name in ("num_documents", "max_new_tokens", "measure_steps"):
            self.require(name, getattr(self, name) >= 1, "give 1 or more")
        self.require("kl_batch_size", size is None or size >= 1, "give 1 or more, or None")
