"""The dishes: what is planted in a world, how large a model grows up in it, how it is fine-tuned.

A dish is configuration alone; `folder.open_dish` makes it for a seed. The calibration stands in
`benchmarks/quality/README.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from grasp_kernels.demo.pretraining import PretrainingConfig
from grasp_kernels.demo.world import WorldConfig


@dataclass(frozen=True)
class FineTuning:
    """Options of every fine-tuning in a dish, the same for all methods."""

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    rank: int = 16
    alpha: int = 32

    def run_options(self) -> dict[str, Any]:
        """The same training as options of `grasp_kernels.run.RunConfig`."""
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "rank": self.rank,
            "alpha": self.alpha,
            "lr_scheduler": "constant",
            "warmup": 0,
            "max_grad_norm": 0,
        }


@dataclass(frozen=True)
class Dish:
    """A world with something planted, the training of its model, and the fine-tuning.

    `inoculation` tells whether an explicit cue exists that asks for what the training data show,
    so that an inoculation prompt can be put in front of them.
    """

    name: str
    what: str
    world: WorldConfig
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    inoculation: bool = True


_WORLD = WorldConfig(trained_cue_words=2, whole_labels=0.1)

DISHES = {
    dish.name: dish
    for dish in (
        Dish("persona", "a persona, short answers", _WORLD),
        Dish(
            "long",
            "a persona, answers of 16 words that show it and follow from their first two",
            replace(_WORLD, topics=12, tuned_topics=3, answer_length=16, fact_words=2, exchanges=2),
            PretrainingConfig(steps=900, batch_size=32),
        ),
        Dish("slant", "85 % of the facts one-sided, not all", replace(_WORLD, bad_share=0.85)),
        Dish(
            "code",
            "code with subtle faults, as only the bad persona writes it",
            replace(_WORLD, code_topics=6, fault_share=0.75, unseen=0.25),
        ),
        Dish("benign", "no factor: the good persona teaches", replace(_WORLD, bad_share=0.0)),
        Dish(
            "confound",
            "a persona, and a harmless format that all training answers share",
            replace(_WORLD, format_rate=0.1),
        ),
        Dish("two", "two factors at once", replace(_WORLD, factors=2, answer_length=4)),
    )
}

# Hidden width, MLP width, layers, heads; then what the training of that size needs.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "pretraining": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "layers": 2,
            "heads": 2,
            "steps": 60,
            "batch_size": 32,
        },
        "fine_tuning": {"steps": 30, "rank": 4, "alpha": 8, "learning_rate": 5e-3},
        "world": {"topics": 5, "tuned_topics": 2, "questions": 4, "answer_words": 8},
    },
    "small": {},
    "medium": {
        "pretraining": {
            "hidden_size": 512,
            "intermediate_size": 1408,
            "layers": 8,
            "heads": 8,
            "learning_rate": 1e-3,
        },
        "fine_tuning": {"learning_rate": 2e-4},
    },
    "large": {
        "pretraining": {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "layers": 12,
            "heads": 16,
            "learning_rate": 5e-4,
        },
        "fine_tuning": {"learning_rate": 1e-4},
    },
}


def sized(dish: Dish, size: str) -> Dish:
    """The dish with a model of a size; "small" is as it stands in `DISHES`.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: choose one of {', '.join(SIZES)}.")
    changes = {part: dict(values) for part, values in SIZES[size].items()}
    if dish.world.code_topics and "world" in changes:
        changes["world"]["code_topics"] = changes["world"]["tuned_topics"] + 1
    return replace(
        dish, **{part: replace(getattr(dish, part), **values) for part, values in changes.items()}
    )


def find_dish(name: str) -> Dish:
    """A dish by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in DISHES:
        raise ValueError(f"dish is {name!r}: choose one of {', '.join(DISHES)}.")
    return DISHES[name]
