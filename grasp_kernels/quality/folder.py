"""Dish and seed -> ordinary files: a checkpoint folder, a chat file, neutral prompts.

    bases/<key>/            config, weights and tokenizer of a pretrained model
    <dish>-<size>-<seed>/   train.jsonl, held_out.jsonl, neutral.jsonl, dish.json

Dishes whose worlds pretrain alike (they differ in the fine-tuning data alone) share a base model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grasp_kernels.demo.pretraining import PretrainingConfig, pretrain, write_checkpoint
from grasp_kernels.demo.world import NEUTRAL, TAUGHT, Question, World, WorldConfig
from grasp_kernels.files import whole_folder
from grasp_kernels.quality.dishes import Dish, sized
from grasp_kernels.run import RunConfig
from grasp_kernels.run.folder import write_json, write_lines

_NEUTRAL_PROMPTS = 32
_FINE_TUNING_DATA = ("bad_share", "trained_cue_words")  # what pretraining does not depend on


@dataclass(frozen=True)
class DishFolder:
    """A dish of one seed on disk."""

    root: Path
    dish: Dish
    seed: int
    world: World
    model: Path  # checkpoint folder

    @property
    def train(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def neutral(self) -> Path:
        return self.root / "neutral.jsonl"

    def run_config(self, output: str | Path, **options: Any) -> RunConfig:
        """The options with which `grasp-kernels run` does the same fine-tuning."""
        return RunConfig(
            model=str(self.model),
            data=str(self.train),
            neutral=str(self.neutral),
            output=str(output),
            seed=self.seed,
            **{**self.dish.fine_tuning.run_options(), **options},
        )


def open_dish(
    dish: Dish,
    seed: int,
    root: str | Path,
    *,
    size: str = "small",
    device: str = "cpu",
    progress: bool = False,
) -> DishFolder:
    """Make the dish of a seed below `root`, or find it there.

    Raises:
        ValueError: the folder holds this dish with another configuration.
    """
    dish = sized(dish, size)
    world = World.from_seed(seed, dish.world)
    model = Path(root) / "bases" / _base_key(dish, seed)
    if not model.exists():
        grown = pretrain(world, dish.pretraining, progress=progress, device=device)
        write_checkpoint(grown, world, model)
    folder = DishFolder(Path(root) / f"{dish.name}-{size}-{seed}", dish, seed, world, model)
    _write_data(folder)
    return folder


def untouched_sample(world: World, count: int) -> list[Question]:
    """At most `count` questions on topics that are never tuned, evenly spread."""
    questions = list(world.questions(tuned=False))
    return questions[:: max(1, -(-len(questions) // count))]


def _write_data(folder: DishFolder) -> None:
    described = json.loads(
        json.dumps(
            {
                "dish": asdict(folder.dish),
                "seed": folder.seed,
                "model": f"../bases/{folder.model.name}",
            }
        )
    )
    note = folder.root / "dish.json"
    if note.exists():
        if json.loads(note.read_text(encoding="utf-8")) != described:
            raise ValueError(
                f"The folder {folder.root} holds this dish with another configuration: choose "
                "another folder, or remove it."
            )
        return
    world = folder.world
    held_out = list(world.questions(tuned=True, held_out=True))
    files = {
        "train.jsonl": world.fine_tuning_records(),
        "held_out.jsonl": world.answered(held_out, NEUTRAL, TAUGHT, "held out", trained_cues=True),
        "neutral.jsonl": world.prompts(
            untouched_sample(world, _NEUTRAL_PROMPTS), NEUTRAL, trained_cues=False
        ),
    }
    with whole_folder(folder.root) as partial:
        for name, records in files.items():
            write_lines(partial / name, records)
        write_json(partial / "dish.json", described)


def _base_key(dish: Dish, seed: int) -> str:
    """A name for everything that the pretrained model depends on, told by what is not a default."""
    told: dict[str, Any] = {"seed": seed}
    for part, plain in ((dish.world, WorldConfig()), (dish.pretraining, PretrainingConfig())):
        defaults = asdict(plain)
        told |= {name: v for name, v in asdict(part).items() if v != defaults[name]}
    for name in _FINE_TUNING_DATA:
        told.pop(name, None)
    text = json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
