"""`grasp-kernels identify`, `extract`, `project` and `check`: work on finished adapters."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from grasp_kernels.cli.options import file_to_write, folder_to_write, number_of_directions
from grasp_kernels.inert import listed, printable


def add_identify(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "identify",
        parents=[common],
        help="find the subspace in which adapters moved",
        description="Find the subspace of the residual stream in which adapters moved. Several "
        "adapters (checkpoints of a run, seeds) are taken as evidence for one subspace.",
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="adapter folder or file")
    parser.add_argument(
        "--output", required=True, type=file_to_write, metavar="FILE", help="new subspace file"
    )
    parser.add_argument(
        "--base-model",
        metavar="FOLDER",
        help="checkpoint of the base model, for its norms (default: the one that the adapter's "
        "config names, where it is on this machine)",
    )
    parser.add_argument(
        "--k",
        default="auto",
        type=number_of_directions,
        metavar="N",
        help="directions, or 'auto': up to the largest gap of the spectrum (default: auto)",
    )
    parser.set_defaults(command=_identify)


def _identify(arguments: argparse.Namespace) -> int:
    from grasp_kernels.subspace import identify

    several = len(arguments.adapters) > 1
    subspace = identify(
        arguments.adapters if several else arguments.adapters[0],
        k=arguments.k,
        base_model=arguments.base_model,
    )
    subspace.save(arguments.output)
    print(subspace.summary())
    print(f"Written to {arguments.output}.")
    return 0


def add_extract(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "extract",
        parents=[common],
        help="make an adapter of a merged or fully fine-tuned model",
        description="Write the LoRA adapter that is nearest to what was changed in a model, so "
        "that identify and inspect can look at it. One weight is in memory at a time, on the GPU "
        "where there is one.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder of the changed model")
    parser.add_argument(
        "--base-model", required=True, metavar="FOLDER", help="checkpoint that it was made from"
    )
    _add_new_adapter(parser)
    parser.add_argument(
        "--rank", type=int, default=16, metavar="N", help="rank of the adapter (default: 16)"
    )
    parser.set_defaults(command=_extract)


def _add_new_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", required=True, type=folder_to_write, metavar="DIR", help="new adapter folder"
    )


def _extract(arguments: argparse.Namespace) -> int:
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


def add_project(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "project",
        parents=[common],
        help="take a subspace out of a finished adapter",
        description="Write an adapter whose weights have nothing in the subspace. This is weaker "
        "than retraining: what was learned through it stays in the other weights.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder")
    parser.add_argument("subspace", metavar="SUBSPACE", help="subspace file")
    _add_new_adapter(parser)
    parser.set_defaults(command=_project)


def _project(arguments: argparse.Namespace) -> int:
    from grasp_kernels import project_adapter
    from grasp_kernels.subspace import Subspace

    left = project_adapter(arguments.adapter, Subspace.load(arguments.subspace), arguments.output)
    if left:
        print(f"Not projected, for the subspace has no basis for it: {listed(left)}.")
    print(f"Written to {arguments.output}.")
    return 0


def add_check(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "check",
        parents=[common],
        help="measure how much of an adapter or merged model lies in a subspace",
        description="Leakage of every layer; exit status 1 if any is above the tolerance, or if "
        "there is something that the subspace has no basis to measure along.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder, or a merged model's")
    parser.add_argument("subspace", metavar="SUBSPACE", help="subspace file")
    parser.add_argument(
        "--base-model", metavar="DIR", help="checkpoint that a merged model was made from"
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=4e-3,
        metavar="X",
        help="largest leakage that passes (default: %(default)g, what bfloat16 storage leaves)",
    )
    parser.set_defaults(command=_check)


def _check(arguments: argparse.Namespace) -> int:
    from grasp_kernels import leakage
    from grasp_kernels.subspace import Subspace

    subspace = Subspace.load(arguments.subspace)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that were not measured are printed below
        measured = leakage(arguments.adapter, subspace, base=arguments.base_model)
    if not (measured.changed or measured.unseen):
        raise ValueError(
            f"Nothing in {arguments.adapter} that writes to the stream is trained: give a trained "
            "adapter, or a model that differs from its base."
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
            f"not looked at, for the subspace has no basis for it: {listed(measured.unseen)}; so "
            "this is no clean bill"
        )
    return 0 if passed and not measured.unseen else 1


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: give a number from 0 to 1.")
    return value
