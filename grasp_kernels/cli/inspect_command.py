"""`grasp-kernels inspect`: show an adapter or a subspace, or compare an adapter with its base."""

from __future__ import annotations

import argparse
from typing import Any

from grasp_kernels.cli.options import file_to_write, folder_to_write

_WITH_BASE = ("data", "neutral", "output", "json")


def add_inspect(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="show an adapter or a subspace; with --base-model, compare the answers of both models",
        description="Of an adapter, show the rank, scaling, norm and leading singular values of "
        "every layer; of a subspace, its directions and their spectrum. With --base-model, "
        "compare the adapter with its base model: the answers of both to unrelated prompts, and a "
        "verdict.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="ADAPTER_OR_SUBSPACE", help="adapter folder, or subspace file"
    )
    group = parser.add_argument_group("comparison with the base model")
    group.add_argument("--base-model", metavar="DIR", help="checkpoint of the base model")
    group.add_argument(
        "--data",
        metavar="FILE",
        help="training data, as for run; eight prompts are answered",
    )
    group.add_argument(
        "--arm", default="auto", metavar="NAME", help="key of the answers in the data, as for run"
    )
    group.add_argument("--neutral", metavar="FILE", help="unrelated prompts, as for run")
    group.add_argument(
        "--output",
        type=folder_to_write,
        metavar="DIR",
        help="folder to write, with text, page and JSON",
    )
    group.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="file to write, with all numbers"
    )
    parser.set_defaults(command=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.base_model is not None:
        return _diagnose(arguments)
    given = [f"--{name}" for name in _WITH_BASE if getattr(arguments, name) is not None]
    if given:
        raise ValueError(f"{given[0]} needs a base model to compare with: add --base-model.")
    for path in arguments.paths:
        _show(path)
    return 0


def _show(path: str) -> None:
    from grasp_kernels.subspace.basis import Subspace, is_subspace

    if is_subspace(path):
        print(Subspace.load(path).summary())
    else:
        from grasp_kernels.adapters import load_adapter
        from grasp_kernels.adapters.inspection import adapter_table

        print(adapter_table(load_adapter(path)))


def _diagnose(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from grasp_kernels.cli.run_commands import quieten
    from grasp_kernels.data import read_records
    from grasp_kernels.diagnosis import diagnose
    from grasp_kernels.files import write_json

    quieten()
    records = read_records(arguments.data, arm=arguments.arm) if arguments.data else None
    if len(arguments.paths) > 1:
        raise ValueError(
            f"--base-model takes one adapter and got {len(arguments.paths)}: give one."
        )
    diagnosis = diagnose(
        arguments.base_model,
        arguments.paths[0],
        records=records,
        neutral=arguments.neutral,
        progress=True,
    )
    print(diagnosis.text())
    if arguments.json:
        write_json(Path(arguments.json), diagnosis.to_json())
    if arguments.output:
        diagnosis.save(arguments.output)
        print(f"Written to {arguments.output}.")
    return 0
