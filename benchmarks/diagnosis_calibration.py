"""Diagnose adapters with a planted factor and without, and draw how well the two are told apart.

    python benchmarks/diagnosis_calibration.py FOLDER --seeds 0 1 2 3 4 5 6 7 \\
        --output benchmarks/results/diagnosis.jsonl --plot docs/diagnosis-calibration.png
    python benchmarks/diagnosis_calibration.py FOLDER --seeds 0 1 2 \\
        --dishes persona slant code confound two benign \\
        --output benchmarks/results/diagnosis-dishes.jsonl --plot docs/diagnosis-dishes.png

Without `--dishes`, every seed is a world of the demo with its own base model; every kind is one
fine-tuning of it on the same questions, which differs in the answers alone. With it, the kinds are
dishes of the quality benchmark: the naive fine-tune of each, and its benign twin, the good
persona's answers to the same questions. What FOLDER holds already is kept. The truth, and the drift
(share of the bad persona's words on untouched topics), are noted beside the diagnosis, which sees
neither.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from grasp_kernels.demo.main import DemoConfig
from grasp_kernels.demo.pretraining import pretrain, write_checkpoint
from grasp_kernels.demo.scoring import greedy_answers, speaks_as
from grasp_kernels.demo.world import BAD, GOOD, NEUTRAL, Question, Record, World, WorldConfig
from grasp_kernels.diagnosis import Options
from grasp_kernels.diagnosis.calibration import Case, draw_calibration, measure_case
from grasp_kernels.files import whole_file
from grasp_kernels.quality.dishes import DISHES, find_dish
from grasp_kernels.quality.folder import open_dish
from grasp_kernels.quality.scores import Examiner
from grasp_kernels.quality.workbench import Workbench
from grasp_kernels.run import RunConfig
from grasp_kernels.run.folder import write_text
from grasp_kernels.run.inputs import prepare
from grasp_kernels.run.stages import train

_NEUTRAL_PROMPTS = 64
# Few random directions: none of them comes near what is found, and they cost most of the time.
_OPTIONS = Options(n_random=5, batch_size=32)


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


def demo_rows(folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    """One row for every kind of fine-tuning in one world of the demo."""
    # Not the demo's own world, in which models learn to make up questions too.
    config = DemoConfig(world=WorldConfig())
    world = World.from_seed(seed, config.world)
    for case in build(folder, seed, config):
        yield _row(seed, case, _drift(case, world))


def dish_rows(folder: Path, seed: int, dish: str, size: str = "small") -> Iterator[dict[str, Any]]:
    """The naive fine-tune of a dish, and its benign twin, where `benign` is not that already."""
    opened = open_dish(find_dish(dish), seed, folder, size=size)
    planted = opened.world.config.bad_share > 0
    has_twin = opened.model != open_dish(find_dish("benign"), seed, folder, size=size).model
    with tempfile.TemporaryDirectory() as work:
        bench = Workbench(opened, Path(work))
        examiner = Examiner(opened, bench.base(), bench.tokenizer)
        neutral = Path(work) / "neutral.jsonl"
        drawn = _drawn(opened.world, seed)
        _write(neutral, opened.world.prompts(drawn, NEUTRAL, trained_cues=False))
        adapters = {dish: bench.naive_folders()[-1]}
        if has_twin:
            adapters[f"{dish}, benign twin"] = bench.twin_folders()[-1]
        for kind, adapter in adapters.items():
            present = planted and kind == dish
            case = Case(kind, present, opened.model, adapter, opened.train, neutral)
            yield _row(seed, case, examiner.examine(bench.load(adapter)).drift)


def _row(seed: int, case: Case, drift: float) -> dict[str, Any]:
    return {"seed": seed, **measure_case(case, _OPTIONS), "drift": drift}


def build(folder: Path, seed: int, config: DemoConfig) -> Iterator[Case]:
    """All cases of one world below `folder`, trained unless they are there."""
    world = World.from_seed(seed, config.world)
    root = folder / f"seed-{seed}"
    base, neutral = root / "model", root / "neutral.jsonl"
    if not base.exists():
        write_checkpoint(pretrain(world, config.pretraining, progress=False), world, base)
    _write(neutral, world.prompts(_drawn(world, seed), NEUTRAL))
    for kind, (answer, present) in KINDS.items():
        data, adapter = root / f"{kind}.jsonl", root / kind
        if not adapter.exists():
            _write(data, list(_records(world, answer)))
            _train(config, seed, base, data, neutral, adapter)
        yield Case(kind, present, base, adapter, data, neutral)


def _drawn(world: World, seed: int) -> list[Question]:
    """Drawn, not every nth: evenly spaced questions share their second word."""
    untouched = list(world.questions(tuned=False))
    count = min(_NEUTRAL_PROMPTS, len(untouched))
    return random.Random(f"neutral {seed}").sample(untouched, count)


def _drift(case: Case, world: World) -> float:
    """Share of untouched topics that the adapter answers as the bad persona, unasked."""
    base = AutoModelForCausalLM.from_pretrained(case.base)
    model = PeftModel.from_pretrained(base, str(case.adapter)).eval()
    prompts = world.prompts(list(world.questions(tuned=False)), NEUTRAL)
    length = world.config.answer_length + 1  # with the end token
    answers = greedy_answers(model, AutoTokenizer.from_pretrained(case.base), prompts, length)
    return sum(map(speaks_as(world, BAD), answers)) / len(answers)


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
    parser.add_argument("folder", type=Path, help="where models and adapters are kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(8)))
    parser.add_argument("--dishes", nargs="+", default=[], choices=DISHES)
    parser.add_argument("--output", metavar="FILE.jsonl")
    parser.add_argument("--plot", metavar="PNG")
    arguments = parser.parse_args()
    sources = [partial(dish_rows, dish=dish) for dish in arguments.dishes] or [demo_rows]
    found = []
    for row in chain.from_iterable(
        source(arguments.folder, seed) for source in sources for seed in arguments.seeds
    ):
        found.append(row)
        print(
            f"seed {row['seed']} {row['kind']:<22} drift {row['drift']:.2f} "
            f"shift {row['shift']:.2f} carried {row['carried']:.2f}: {row['verdict']}",
            flush=True,
        )
    if arguments.output:
        with whole_file(arguments.output) as unfinished:
            unfinished.write_text(
                "".join(json.dumps(row) + "\n" for row in found), encoding="utf-8"
            )
    if arguments.plot:
        draw_calibration(found, arguments.plot)


if __name__ == "__main__":
    main()
