"""What did an adapter learn along one direction? Identify, look, and measure.

    python examples/audit_adapter.py ADAPTER [ADAPTER ...] --output FOLDER [--base-model MODEL]
    python examples/audit_adapter.py ADAPTER --subspace FILE

Several adapters are checkpoints of one run, or runs with other seeds, whose weights are stacked.
With a subspace that is known already, only how much of the last adapter lies along it is shown.
"""

import argparse
from pathlib import Path

import grasp_kernels as gk


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", nargs="+")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--output", type=Path, help="folder for the subspace")
    source.add_argument("--subspace", help="measure along this one")
    parser.add_argument("--base-model", help="where the adapter's config does not say it")
    arguments = parser.parse_args()

    if arguments.subspace:
        subspace = gk.Subspace.load(arguments.subspace)
    else:
        subspace = gk.identify(arguments.adapters, base_model=arguments.base_model)
        arguments.output.mkdir(parents=True, exist_ok=True)
        subspace.save(arguments.output / "subspace.safetensors")
    print(subspace.summary())
    leaks = gk.leakage(arguments.adapters[-1], subspace)
    for name, share in sorted(leaks.items(), key=lambda item: -item[1]):
        print(f"{share:8.2%} of the update of {name} lies along the subspace")
    for name in leaks.unseen:
        print(f"not looked at: {name}")


if __name__ == "__main__":
    main()
