"""`grasp-kernels inspect`: compare the answers of an adapter with those of its base model."""

import argparse
from pathlib import Path
from typing import Any

from grasp_kernels.cli.options import add_command, folder_to_write


def add_inspect(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        _inspect,
        "compare the answers of an adapter with those of its base model",
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
    diagnosis = diagnose(
        base, arguments.adapter, records=records, neutral=arguments.neutral, progress=True
    )
    print(diagnosis.text())
    if arguments.output:
        diagnosis.save(arguments.output)
        print(f"Written to {arguments.output}.")
    return 0
