"""From a seed to one table and one figure, through the public `run`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.demo.comparison import draw, table
from benchmarks.demo.pretraining import PretrainingConfig, pretrain, write_checkpoint
from benchmarks.demo.scoring import Scores, score
from benchmarks.demo.world import NEUTRAL, World, WorldConfig
from grasp_kernels import RunConfig, run
from grasp_kernels.files import check_own_folder, read_json, write_json, write_text
from grasp_kernels.models.checkpoint import load_model, load_tokenizer

_NEUTRAL_PROMPTS = 32
_NOTE = "demo.json"
_RESTORE = "restore it, or choose another folder"
_INPUTS = ("model", "train.jsonl", "neutral.jsonl", "run")


@dataclass(frozen=True)
class DemoConfig:
    """The world, the model that grows up in it, and the fine-tuning that spoils it.

    `fine_tuning` holds the options of `RunConfig` that differ from its defaults: a model of this
    size needs a higher learning rate and more steps than a large one.
    """

    # A tenth of the documents teaches questions too, so that the model can make up a user's turn,
    # as any instruction-tuned model can.
    world: WorldConfig = field(default_factory=lambda: WorldConfig(whole_labels=0.1))
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    fine_tuning: Mapping[str, Any] = field(
        default_factory=lambda: {
            "max_steps": 300,
            "naive_steps": 300,
            "per_device_train_batch_size": 16,
            "learning_rate": 5e-4,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 0,
        }
    )


def run_demo(
    output: str | Path, *, seed: int = 0, config: DemoConfig | None = None
) -> dict[str, Scores]:
    """Run the whole demo in the folder `output` and print its table; stopped, it goes on.

    Writes `model/` and `train.jsonl` (inputs of an ordinary `grasp-kernels run`), `run/` (its
    output), `scores.json`, `table.md` and `figure.png`.

    Returns:
        Scores by model: base, naive LoRA, retrained LoRA.

    Raises:
        ValueError: the folder holds another demo, or something else; or a seed out of range.
    """
    config = config or DemoConfig()
    output = Path(output)
    options = _options(output, seed, config)
    _claim(output, seed, config)
    world = World.from_seed(seed, config.world)
    _write_inputs(output, world, config)
    report = run(options)
    adapters = {"naive LoRA": report.naive}
    if report.retrained is not None:
        adapters["retrained LoRA"] = report.retrained
    scores = _score_all(options, world, adapters)
    text = table(scores)
    write_json(output / "scores.json", {name: asdict(row) for name, row in scores.items()})
    write_text(output / "table.md", f"{text}\n")
    draw(scores, output / "figure.png", title=f"A persona planted in a small world (seed {seed})")
    print(f"\n{text}\n\nfigure: {output / 'figure.png'}\nreport of the run: {report.text}")
    return scores


def _options(output: Path, seed: int, config: DemoConfig) -> RunConfig:
    """The run of the demo, on the files that it writes."""
    model, data, neutral, run_output = (str(output / name) for name in _INPUTS)
    return RunConfig(
        model=model,
        data=data,
        neutral=neutral,
        output=run_output,
        seed=seed,
        **config.fine_tuning,
    )


def _claim(output: Path, seed: int, config: DemoConfig) -> None:
    """Note down which demo this folder holds; refuse to mix two, or a demo and something else."""
    path = output / _NOTE
    ours = json.loads(json.dumps({"seed": seed, **asdict(config)}))
    if not path.exists():
        check_own_folder(output, _NOTE)
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, ours)
    elif (begun := read_json(path, "note of a demo", _RESTORE)) != ours:
        raise ValueError(
            f"The folder {output} holds a demo with another configuration (seed "
            f"{begun.get('seed')}): repeat that one to go on with it, or choose another folder."
        )


def _write_inputs(output: Path, world: World, config: DemoConfig) -> None:
    """What a user of `grasp-kernels run` brings along: a checkpoint folder and a chat file."""
    model, data, neutral, _ = (output / name for name in _INPUTS)
    if not model.exists():
        write_checkpoint(pretrain(world, config.pretraining), world, model)
    _write_lines(data, world.fine_tuning_records())
    untouched = list(world.questions(tuned=False))
    every = max(1, len(untouched) // _NEUTRAL_PROMPTS)
    _write_lines(neutral, world.prompts(untouched[::every], NEUTRAL))


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    write_text(path, "".join(f"{json.dumps(value)}\n" for value in values))


def _score_all(options: RunConfig, world: World, adapters: Mapping[str, Path]) -> dict[str, Scores]:
    """Score the base model, then with each adapter, all loaded as any user of peft would."""
    checkpoint = Path(options.model)
    tokenizer = load_tokenizer(checkpoint)
    scores = {}
    for name, folder in {"base": None, **adapters}.items():
        model: Any = load_model(checkpoint, where=torch.device("cpu"))
        if folder is not None:
            model = PeftModel.from_pretrained(model, str(folder))
        scores[name] = score(model.eval(), tokenizer, world)
    return scores
