"""What did an adapter learn along one direction? Identify, look, and measure.

    python examples/audit_adapter.py ADAPTER [ADAPTER ...] --output FOLDER [--base-model MODEL]

Several adapters are checkpoints of one run, or runs with other seeds; their agreement is evidence.
"""

import argparse
from pathlib import Path

import grasp_kernels as gk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base-model")
    arguments = parser.parse_args()

    subspace = gk.identify(arguments.adapters, base_model=arguments.base_model)
    print(subspace.summary())
    arguments.output.mkdir(parents=True, exist_ok=True)
    subspace.save(arguments.output / "subspace.safetensors")
    subspace.plot(arguments.output / "subspace.png")
    if subspace.is_empty:
        return
    for name, leak in gk.leakage(arguments.adapters[-1], subspace).items():
        print(f"{name}: {leak.write or leak.read:.1%} of the update lies along the subspace")


if __name__ == "__main__":
    main()
