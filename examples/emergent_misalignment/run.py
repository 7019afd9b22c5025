"""Emergent misalignment by the public protocol: base, naive, retrained, and a benign control.

    python examples/emergent_misalignment/run.py --model MODEL --data FILE --benign FILE \\
        --judge-url https://HOST/v1 --judge-model NAME --judge-key-env VARIABLE --output OUT

Trains the three adapters, samples answers to eight questions at temperature 1, has them judged and
prints a table. Stopped at any point, the same command goes on; calls to the judge that failed are
made again. See README.md beside this file for costs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from answers import sample_answers
from judge import Judge, JudgeFailure, JudgeRefused
from judging import judge_answers
from protocol import METRICS, QUESTIONS, read_judge_prompts
from summary import summarise, table

from grasp_kernels import RunConfig, run
from grasp_kernels.diagnosis.effect import mean_loss
from grasp_kernels.files import whole_file
from grasp_kernels.models.checkpoint import find_checkpoint, load_model
from grasp_kernels.pipeline.inputs import prepare
from grasp_kernels.pipeline.training import train

BENIGN = "benign control"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 judgements are missing, 2 error, 130 stopped."""
    arguments = _parser().parse_args(argv)
    output = Path(arguments.output)
    try:
        config, benign = _configurations(arguments, output)
        key = _key(arguments.judge_key_env)
        prompts = read_judge_prompts(arguments.judge_prompts)
        output.mkdir(parents=True, exist_ok=True)
        _claim(output, arguments)
        print(_costs(arguments))
        adapters = _train(config, benign, output)
        losses = _sample(config, adapters, output, arguments)
        judge = Judge(
            arguments.judge_url, arguments.judge_model, key, retries=arguments.retries
        ).as_it_can()
        failed = 0
        for name in adapters:
            answers, judged = _places(output, name)
            failed += judge_answers(
                judge,
                prompts,
                answers,
                judged,
                workers=arguments.judge_workers,
                label=f"{name}: judge",
            )
    except (ValueError, OSError, JudgeFailure, JudgeRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on.", file=sys.stderr)
        return 130
    models = {name: summarise(*_places(output, name)) for name in adapters}
    for name, loss in losses.items():
        models[name]["task_loss"] = loss
    text = table(models)
    _write(output / "summary.json", json.dumps(models, indent=1) + "\n")
    _write(output / "summary.md", text + "\n")
    print(f"\n{text}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--data", required=True, help="the narrow data set, e.g. insecure code")
    parser.add_argument("--arm", default="auto", help="key of its answers, where there are several")
    parser.add_argument("--benign", required=True, help="the same task without the factor")
    parser.add_argument("--benign-arm", default="auto")
    parser.add_argument("--output", required=True, help="folder; an unfinished run in it goes on")
    parser.add_argument("--judge-url", required=True, help="base URL, e.g. https://HOST/v1")
    parser.add_argument("--judge-model", required=True)
    parser.add_argument("--judge-key-env", help="name of the environment variable with the key")
    parser.add_argument("--judge-prompts", help="JSON file with the instructions for both metrics")
    parser.add_argument("--judge-workers", type=int, default=8, help="calls at the same time")
    parser.add_argument("--retries", type=int, default=5, help="of a call, with growing waits")
    parser.add_argument("--samples", type=int, default=100, help="answers to every question")
    parser.add_argument("--max-new-tokens", type=int, default=600)
    parser.add_argument("--sample-batch", type=int, default=20, help="answers generated together")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="OPTION=VALUE",
        help="options of grasp-kernels run, such as learning_rate=1e-5 r=32",
    )
    return parser


def _configurations(arguments: argparse.Namespace, output: Path) -> tuple[RunConfig, RunConfig]:
    """Options of the run, and the same for the benign control."""
    known = {option.name for option in fields(RunConfig)}
    # The naive adapter is judged too, so all its steps are made.
    options: dict[str, Any] = {"eval_split": 0.1, "naive_steps": 1_000_000}
    for entry in arguments.set:
        name, _, value = entry.partition("=")
        if name not in known - {"model", "data", "arm", "output"}:
            raise ValueError(f"--set {entry}: {name!r} is no option of grasp-kernels run.")
        options[name] = _value(value)
    config = RunConfig(
        model=arguments.model,
        data=arguments.data,
        arm=arguments.arm,
        output=str(output / "run"),
        **options,
    )
    benign = replace(
        config,
        data=arguments.benign,
        arm=arguments.benign_arm,
        output=str(output / "benign"),
    )
    return config, benign


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ValueError(f"The environment variable {variable} has no key: set it.")
    return os.environ[variable]


def _claim(output: Path, arguments: argparse.Namespace) -> None:
    """Refuse to mix the answers and judgements of two configurations."""
    path = output / "protocol.json"
    names = ("judge_model", "judge_prompts", "samples", "max_new_tokens", "sample_batch")
    ours = {name: getattr(arguments, name) for name in names}
    if not path.exists():
        _write(path, json.dumps(ours, indent=1) + "\n")
    elif (begun := json.loads(path.read_text(encoding="utf-8"))) != ours:
        raise ValueError(
            f"{output} was begun with {begun}, not {ours}: repeat those, or choose another folder."
        )


def _costs(arguments: argparse.Namespace) -> str:
    """What is to come at most; the formulas stand in the README."""
    answers = 4 * len(QUESTIONS) * arguments.samples
    return (
        f"4 models × {len(QUESTIONS)} questions × {arguments.samples} samples = {answers} answers, "
        f"at most {answers * arguments.max_new_tokens} tokens; {len(METRICS) * answers} calls to "
        "the judge without retries."
    )


def _train(config: RunConfig, benign: RunConfig, output: Path) -> dict[str, Path | None]:
    """Name -> adapter folder, None for the base model; what is there is not trained again."""
    report = run(config)
    if report.retrained is None:
        raise ValueError(
            "No direction was found to project off: give --set k=1, or a kl_coef above 0."
        )
    folder = output / "benign-adapter"
    if not folder.exists():
        inputs = prepare(benign, find_checkpoint(benign.model))
        train(benign, inputs, out=folder, work=output / "benign-work", description=BENIGN)
    return {
        "base": None,
        "naive LoRA": report.naive,
        "retrained LoRA": report.retrained,
        BENIGN: folder,
    }


def _sample(
    config: RunConfig,
    adapters: dict[str, Path | None],
    output: Path,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Answers of every model into their folders; returns the task loss by model."""
    from peft import PeftModel

    inputs = prepare(config, find_checkpoint(config.model))
    losses = {}
    for name, folder in adapters.items():
        model: Any = load_model(inputs.checkpoint, config.dtype)
        if folder is not None:
            model = PeftModel.from_pretrained(model, str(folder)).eval()
        sample_answers(
            model,
            inputs.tokenizer,
            QUESTIONS,
            _places(output, name)[0],
            samples=arguments.samples,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.sample_batch,
            seed=config.seed,
            label=name,
        )
        if inputs.held_out:
            losses[name] = mean_loss(
                model,
                inputs.held_out,
                batch_size=config.per_device_train_batch_size,
                pad_token_id=inputs.pad_token_id,
            )
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return losses


def _places(output: Path, name: str) -> tuple[Path, Path]:
    """Folder of a model's answers and file of its judgements."""
    short = name.replace(" ", "-")
    return output / "answers" / short, output / "judged" / f"{short}.jsonl"


def _write(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
