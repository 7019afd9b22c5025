"""Dishes small enough for the tests; a model of this size learns little, and needs not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from grasp_kernels.quality.dishes import Dish, find_dish
from grasp_kernels.quality.folder import DishFolder, open_dish
from grasp_kernels.quality.workbench import Workbench


def short(dish: Dish, steps: int = 3) -> Dish:
    """The dish with a fine-tuning of a few steps; the size "tiny" would set them again."""
    return replace(dish, fine_tuning=replace(dish.fine_tuning, steps=steps))


def tiny_folder(root: Path, name: str = "persona", seed: int = 0) -> DishFolder:
    return open_dish(find_dish(name), seed, root, size="tiny")


def tiny_bench(root: Path, name: str = "persona", seed: int = 0, steps: int = 3) -> Workbench:
    folder = tiny_folder(root / "dishes", name, seed)
    folder = replace(folder, dish=short(folder.dish, steps))
    work = root / f"work-{name}-{seed}-{steps}"
    work.mkdir()
    return Workbench(folder, work)
