"""`grasp-kernels identify`, `inspect`, `extract`, `project`, `fold`, `check`: finished adapters."""

import argparse
import warnings
from pathlib import Path
from typing import Any

from grasp_kernels.cli.options import (
    UsageError,
    add_command,
    file_to_write,
    folder_to_write,
    number_of_directions,
)
from grasp_kernels.inert import listed, printable


def add_identify(commands: Any) -> None:
    parser = add_command(
        commands, "identify", _identify, "find the subspace along which adapters moved their model"
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="adapter folder or file")
    parser.add_argument(
        "--output", required=True, type=file_to_write, metavar="FILE", help="subspace file to write"
    )
    parser.add_argument(
        "--base-model",
        metavar="FOLDER",
        help="checkpoint of the base model, for the weights of its norms (default: the one named "
        "in the adapter's configuration, if it is on this machine)",
    )
    parser.add_argument(
        "--k",
        default="auto",
        type=number_of_directions,
        metavar="N",
        help="number of directions; 'auto': those before the largest gap of the spectrum (default: "
        "auto)",
    )


def _identify(arguments: argparse.Namespace) -> int:
    """Find the subspace of the residual stream along which adapters moved their model.

    Several adapters (checkpoints of a run, or seeds) count as evidence for one subspace.
    """
    from grasp_kernels.subspace import identify

    subspace = identify(arguments.adapters, k=arguments.k, base_model=arguments.base_model)
    subspace.save(arguments.output)
    print(subspace.summary())
    print(f"Written to {arguments.output}.")
    return 0


def add_inspect(commands: Any) -> None:
    parser = add_command(
        commands, "inspect", _inspect, "compare the answers of an adapter with its base model's"
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder")
    for name, metavar, what in (
        ("--base-model", "DIR", "checkpoint of the base model (default: as the adapter names it)"),
        ("--data", "FILE", "training data, as for run; eight prompts are answered"),
        ("--arm", "NAME", "key of the answers in the data, as for run"),
        ("--neutral", "FILE", "unrelated prompts, as for run"),
    ):
        parser.add_argument(name, metavar=metavar, help=what)
    parser.add_argument(
        "--output", type=folder_to_write, metavar="DIR", help="folder for text, page and JSON"
    )
    parser.set_defaults(arm="auto")


def _inspect(arguments: argparse.Namespace) -> int:
    """Let an adapter and its base model answer unrelated prompts; show answers and a verdict."""
    from grasp_kernels.adapters.files import find_weights, read_config
    from grasp_kernels.cli.run_commands import quieten
    from grasp_kernels.data import read_records
    from grasp_kernels.diagnosis import diagnose

    quieten()
    if arguments.arm != "auto" and not arguments.data:
        raise ValueError("--arm chooses answers of data: add --data.")
    base = arguments.base_model
    if base is None:
        weights = find_weights(Path(arguments.adapter), None)
        base = read_config(weights).get("base_model_name_or_path")
        if not base or not Path(base).is_dir():  # nothing is fetched that a file names
            raise ValueError(
                f"The adapter {arguments.adapter} names the base model {base!r}, which is not a "
                "folder here: add --base-model."
            )
    records = read_records(arguments.data, arm=arguments.arm) if arguments.data else None
    given: dict[str, Any] = {"records": records, "neutral": arguments.neutral}
    diagnosis = diagnose(base, arguments.adapter, **given, progress=True)
    print(diagnosis.text())
    if arguments.output:
        diagnosis.save(arguments.output)
        print(f"Written to {arguments.output}.")
    return 0


def add_extract(commands: Any) -> None:
    parser = add_command(
        commands, "extract", _extract, "make an adapter of a merged or fully fine-tuned model"
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder of the changed model")
    parser.add_argument(
        "--base-model", required=True, metavar="FOLDER", help="the model before the changes"
    )
    _add_new_adapter(parser)
    parser.add_argument("--rank", type=int, default=16, metavar="N", help="rank (default: 16)")


def _add_new_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", required=True, type=folder_to_write, metavar="DIR", help="folder to write"
    )


def _extract(arguments: argparse.Namespace) -> int:
    """Write the LoRA adapter that comes closest to the changes in a model.

    Commands for adapters, such as identify and inspect, can read it. Only one weight is in memory
    at a time, on the GPU if there is one.
    """
    import torch

    from grasp_kernels import extract_adapter

    extraction = extract_adapter(
        arguments.model,
        arguments.base_model,
        arguments.output,
        rank=arguments.rank,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    print(extraction.text())
    print(f"Written to {arguments.output}.")
    return 0


def add_project(commands: Any) -> None:
    parser = add_command(commands, "project", _project, "remove a subspace from a finished adapter")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder")
    parser.add_argument("subspace", metavar="SUBSPACE", help="subspace file")
    _add_new_adapter(parser)


def _project(arguments: argparse.Namespace) -> int:
    """Write an adapter whose weights have no part in the subspace.

    This is weaker than retraining: anything learned through the subspace stays in the other
    weights.
    """
    from grasp_kernels import project_adapter
    from grasp_kernels.subspace import Subspace

    left = project_adapter(arguments.adapter, Subspace.load(arguments.subspace), arguments.output)
    if left:
        print(f"Not projected, because the subspace has no basis there: {listed(left)}.")
    print(f"Written to {arguments.output}.")
    return 0


def add_fold(commands: Any) -> None:
    parser = add_command(commands, "fold", _fold, "write an adapter with its scaling in lora_B")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder")
    parser.add_argument(
        "--base-model",
        metavar="FOLDER",
        help="checkpoint of the base model; modules that were saved with the adapter and are equal "
        "to those of the base are left out",
    )
    _add_new_adapter(parser)


def _fold(arguments: argparse.Namespace) -> int:
    """Write an adapter that computes the same, with the scaling of every module in its lora_B.

    It has one rank, no rsLoRA and no patterns, which llama.cpp, ollama, OpenVINO and vLLM read
    otherwise than peft.
    """
    from grasp_kernels import fold_scaling

    left = fold_scaling(arguments.adapter, arguments.output, base=arguments.base_model)
    if left:
        print(f"Left out, because it is as in the base: {listed(left)}.")
    print(f"Written to {arguments.output}.")
    return 0


def add_check(commands: Any) -> None:
    parser = add_command(
        commands,
        "check",
        _check,
        "measure the part of an adapter or merged model that lies in a subspace, or see whether "
        "other software reads an adapter as peft does",
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="adapter folder, or checkpoint folder of a merged model"
    )
    parser.add_argument("subspace", nargs="?", metavar="SUBSPACE", help="subspace file")
    parser.add_argument(
        "--for",
        metavar="SOFTWARE",
        help="software that is to load the adapter: vllm, llama.cpp, ollama, openvino or mlx",
    )
    parser.add_argument("--base-model", metavar="DIR", help="base checkpoint of a merged model")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=4e-3,
        metavar="X",
        help="largest leakage that passes (default: %(default)g, the rounding of bfloat16 files)",
    )


def _check(arguments: argparse.Namespace) -> int:
    """Measure the leakage of every layer.

    The exit status is 1 if one is above the tolerance, or if something could not be measured
    because the subspace has no basis there. With --for instead of a subspace: say what other
    software leaves out, refuses or scales wrongly; the exit status is 1 if there is anything.
    """
    consumer = vars(arguments)["for"]
    if (arguments.subspace is None) == (consumer is None):
        raise UsageError("check takes SUBSPACE or --for: give one (see grasp-kernels check -h).")
    if consumer is None:
        return _check_along(arguments)
    from grasp_kernels.adapters.portable import consumer_advice, consumer_problems

    problems = consumer_problems(arguments.adapter, consumer)
    print(*problems or [f"{consumer} reads this adapter as peft does."], sep="\n")
    if advice := consumer_advice(arguments.adapter, consumer):
        print(advice)
    return 1 if problems else 0


def _check_along(arguments: argparse.Namespace) -> int:
    from grasp_kernels import leakage
    from grasp_kernels.subspace import Subspace

    subspace = Subspace.load(arguments.subspace)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that were not measured are printed below
        measured = leakage(arguments.adapter, subspace, base=arguments.base_model)
    if not (measured.changed or measured.unseen):
        raise ValueError(
            f"No layer of {arguments.adapter} that writes to the residual stream is trained: give "
            "a trained adapter, or a model that differs from its base."
        )
    names = [printable(name) for name in measured]
    width = max(map(len, names))
    print(f"{'module':<{width}}  {'leakage':>9}")
    for name, share in zip(names, measured.values(), strict=True):
        print(f"{name:<{width}}  {share:>9.2e}")
    largest = max(measured.values())
    passed = largest <= arguments.tolerance
    place = "within" if passed else "above"
    print(f"largest leakage {largest:.3g}: {place} the tolerance {arguments.tolerance:g}")
    if measured.unseen:
        print(
            f"not measured, because the subspace has no basis there: {listed(measured.unseen)}; so "
            "the check is incomplete"
        )
    return 0 if passed and not measured.unseen else 1


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give a number from 0 to 1.")
    return value
