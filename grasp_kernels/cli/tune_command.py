"""`grasp-kernels tune`: find the fastest launch of every kernel for the layers of known models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_tune(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "tune",
        parents=[common],
        help="tune kernel launches for this GPU",
        description="Time every Triton launch of the linear layers of a model with a few other "
        "block sizes than those of the built-in table, and keep what is right and faster by more "
        "than the measurements spread. grasp_kernels.load_tuning(FILE) puts the choices in force; "
        "nothing does so by itself. A FILE that is there already is continued.",
    )
    parser.add_argument(
        "--models", nargs="+", required=True, metavar="NAME", help="names of bench --list"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the choices, as JSON")
    for name, default, what in (
        ("--rank", 16, "LoRA rank"),
        ("--basis", 4, "size of the basis; 0: none"),
        ("--tokens", 8192, "tokens to time with; the choices hold for any number"),
        ("--rounds", 25, "measurements of each choice"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{what}, default {default}")
    parser.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    parser.add_argument(
        "--dropout", action="store_true", help="launches of layers with dropout, of any probability"
    )
    parser.set_defaults(
        command=_tune, when_stopped="the choices so far are in the file of --output."
    )


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    _check_sizes(arguments)
    device = _device()
    from grasp_kernels.bench.launches import keys_of
    from grasp_kernels.bench.tune import gains, timer_on, tune
    from grasp_kernels.ops.gpu.launch import part_of
    from grasp_kernels.ops.gpu.tuning import Fields, Key, read_tuning, save_tuning

    part, dtype = part_of(device), getattr(torch, arguments.dtype)
    sizes = arguments.tokens, arguments.rank, arguments.basis
    keys = keys_of(_linears(arguments.models), *sizes, dtype, arguments.dropout, part)
    there = Path(arguments.output).is_file()
    choices: dict[Key, Fields] = read_tuning(arguments.output) if there else {}
    save_tuning(arguments.output, part.name, choices)  # before the work: whether it can be written
    wanted = [key for key in keys if key not in choices]
    outcomes = []
    timer = timer_on(device, arguments.rounds)
    for key in _with_progress(wanted):
        outcomes.append(tune(key, arguments.tokens, dtype, device, timer))
        choices[key] = outcomes[-1].fields
        save_tuning(arguments.output, part.name, choices)
    print(gains(outcomes))
    print(
        f"{len(wanted)} launches tuned, {len(keys) - len(wanted)} were in the file already; "
        f"grasp_kernels.load_tuning({arguments.output!r}) puts them in force."
    )
    return 0


def _check_sizes(arguments: argparse.Namespace) -> None:
    """Raise ValueError with one sentence for a value that cannot be."""
    from grasp_kernels.bench.shapes import MODELS

    dtypes = ("bfloat16", "float16", "float32")
    for kind, names, known in (
        ("model", arguments.models, MODELS),
        ("dtype", [arguments.dtype], dtypes),
    ):
        unknown: Sequence[str] = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"{kind} {unknown[0]!r} is unknown; use one of {sorted(known)}.")
    for name, least in (("tokens", 1), ("rank", 1), ("basis", 0), ("rounds", 2)):
        value = getattr(arguments, name)
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}.")


def _device() -> Any:
    """The current GPU; RuntimeError where Triton's kernels cannot run on one."""
    import torch

    from grasp_kernels import backends

    if not torch.cuda.is_available():
        raise RuntimeError("tuning times kernels on a GPU and torch sees none; run it on one.")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = backends(device)["triton"]
    if reason is not None:
        raise RuntimeError(f"tuning times kernels of backend 'triton', which cannot run: {reason}.")
    return device


def _linears(models: Sequence[str]) -> list[Any]:
    from grasp_kernels.bench.shapes import MODELS

    return [linear for name in models for linear in MODELS[name].linears]


def _with_progress(keys: Sequence[Any]) -> Any:
    from tqdm.auto import tqdm

    return tqdm(keys, desc="tuning", unit="launch")
