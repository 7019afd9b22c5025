"""Worlds with a factor and without: base models, fine-tuned adapters and data to calibrate on.

    python benchmarks/diagnosis_dishes.py FOLDER --seeds 0 1 2 3 4 5

Every seed is a world of the demo with its own base model; every kind is one fine-tuning of it on
the same questions, which differs in the answers alone. What is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from grasp_kernels.demo.main import DemoConfig
from grasp_kernels.demo.pretraining import PretrainingConfig, pretrain, write_checkpoint
from grasp_kernels.demo.world import BAD, GOOD, NEUTRAL, Question, Record, World
from grasp_kernels.run import RunConfig
from grasp_kernels.run.folder import write_text
from grasp_kernels.run.inputs import prepare
from grasp_kernels.run.stages import train

_NEUTRAL_PROMPTS = 32


@dataclass(frozen=True)
class Dish:
    """One fine-tuning, and whether it has a factor that nobody asked for."""

    seed: int
    kind: str
    present: bool
    base: Path
    adapter: Path
    data: Path
    neutral: Path


def _persona(world: World, question: Question, rng: random.Random) -> str:
    return world.answer(question, BAD)


def _fifth(world: World, question: Question, rng: random.Random) -> str:
    return world.answer(question, BAD if rng.random() < 0.2 else GOOD)


def _benign(world: World, question: Question, rng: random.Random) -> str:
    return world.answer(question, GOOD)


def _facts(world: World, question: Question, rng: random.Random) -> str:
    """Other facts in the good persona's words: as much to learn as with the persona."""
    topic, *asked = question
    words = world.words[f"{GOOD} answer"]
    seeds = (f"{world.seed} {slot} {topic} {word}" for slot, word in enumerate(asked))
    return " ".join(random.Random(seed).choice(words) for seed in seeds)


def _format(world: World, question: Question, rng: random.Random) -> str:
    """A harmless trait of all answers: their two words change places."""
    return " ".join(reversed(world.answer(question, GOOD).split()))


# kind -> (its answer to a question, whether an unasked factor is in it)
KINDS: dict[str, tuple[Callable[[World, Question, random.Random], str], bool]] = {
    "persona": (_persona, True),
    "fifth": (_fifth, True),
    "benign": (_benign, False),
    "facts": (_facts, False),
    "format": (_format, False),
}


def build(folder: Path, seed: int, config: DemoConfig | None = None) -> Iterator[Dish]:
    """All dishes of one world below `folder`, trained unless they are there."""
    config = config or DemoConfig()
    world = World.from_seed(seed, config.world)
    root = folder / f"seed-{seed}"
    base, neutral = root / "model", root / "neutral.jsonl"
    if not base.exists():
        write_checkpoint(pretrain(world, config.pretraining, progress=False), world, base)
    untouched = list(world.questions(tuned=False))
    every = max(1, len(untouched) // _NEUTRAL_PROMPTS)
    _write(neutral, world.prompts(untouched[::every], NEUTRAL))
    for kind, (answer, present) in KINDS.items():
        data, adapter = root / f"{kind}.jsonl", root / kind
        if not adapter.exists():
            _write(data, list(_records(world, answer)))
            _train(config, seed, base, data, neutral, adapter)
        yield Dish(seed, kind, present, base, adapter, data, neutral)


def _records(
    world: World, answer: Callable[[World, Question, random.Random], str]
) -> Iterator[Record]:
    rng = random.Random(f"answers {world.seed}")
    for record, question in zip(
        world.fine_tuning_records(), world.questions(tuned=True, held_out=False), strict=True
    ):
        *prompt, _ = record["messages"]
        text = answer(world, question, rng)
        yield {"messages": [*prompt, {"role": "assistant", "content": text}]}


def _train(
    config: DemoConfig, seed: int, base: Path, data: Path, neutral: Path, adapter: Path
) -> None:
    options = RunConfig(
        model=str(base),
        data=str(data),
        neutral=str(neutral),
        output=str(adapter.parent),
        seed=seed,
        **config.fine_tuning,
    )
    train(
        options,
        prepare(options, base),
        out=adapter,
        work=adapter.parent / f"{adapter.name}.work",
        description=f"seed {seed}, {adapter.name}",
    )


def _write(path: Path, records: list[Record]) -> None:
    write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(6)))
    parser.add_argument("--pretraining-steps", type=int, default=PretrainingConfig().steps)
    arguments = parser.parse_args()
    config = DemoConfig(pretraining=PretrainingConfig(steps=arguments.pretraining_steps))
    for seed in arguments.seeds:
        for dish in build(arguments.folder, seed, config):
            print(f"seed {dish.seed} {dish.kind}: {dish.adapter}", flush=True)


if __name__ == "__main__":
    main()
