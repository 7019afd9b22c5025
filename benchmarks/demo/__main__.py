"""`python -m benchmarks.demo`: a small world with a planted persona, the whole way in minutes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.demo.main import run_demo
from grasp_kernels.cli.run_commands import quieten
from grasp_kernels.pipeline.config import MOST_SEED


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Build a small world with a planted persona, pretrain a small model on it, "
        "do the whole run on its checkpoint and chat file, and score all models.",
    )
    parser.add_argument("--output", default="demo-output", help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="another seed, another world")
    options = parser.parse_args(arguments)
    quieten()
    try:
        run_demo(options.output, seed=options.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) <= MOST_SEED):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a seed: give a whole number from 0 to {MOST_SEED}."
        )
    return int(text)


if __name__ == "__main__":
    main()
