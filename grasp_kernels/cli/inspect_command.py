"""`grasp-kernels inspect`: compare the answers of an adapter with those of its base model."""

import argparse
from pathlib import Path
from typing import Any

from grasp_kernels.cli.options import file_to_write, folder_to_write


def add_inspect(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="compare the answers of an adapter with those of its base model",
        description="Let an adapter and its base model answer unrelated prompts; show both answers "
        "and a verdict.",
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
        "--output",
        type=folder_to_write,
        metavar="DIR",
        help="folder to write, with text, page and JSON",
    )
    parser.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="file to write, with all numbers"
    )
    parser.set_defaults(command=_inspect, arm="auto")


def _inspect(arguments: argparse.Namespace) -> int:
    from grasp_kernels.adapters.files import CONFIG, find_weights, read_config
    from grasp_kernels.cli.run_commands import quieten
    from grasp_kernels.data import read_records
    from grasp_kernels.diagnosis import diagnose
    from grasp_kernels.files import write_json

    quieten()
    if arguments.arm != "auto" and not arguments.data:
        raise ValueError("--arm chooses answers of data: add --data.")
    base = arguments.base_model
    if base is None:
        folder = find_weights(Path(arguments.adapter), None).parent
        base = read_config(folder / CONFIG).get("base_model_name_or_path")
        if not base or not Path(base).is_dir():  # nothing is fetched that a file names
            raise ValueError(
                f"The adapter {arguments.adapter} names the base model {base!r}, which is not a "
                "folder here: add --base-model."
            )
    records = read_records(arguments.data, arm=arguments.arm) if arguments.data else None
    diagnosis = diagnose(
        base, arguments.adapter, records=records, neutral=arguments.neutral, progress=True
    )
    print(diagnosis.text())
    if arguments.json:
        write_json(Path(arguments.json), diagnosis.to_json())
    if arguments.output:
        diagnosis.save(arguments.output)
        print(f"Written to {arguments.output}.")
    return 0
