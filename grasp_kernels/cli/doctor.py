"""`grasp-kernels doctor`: what is installed, what can run, and why the rest cannot."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from grasp_kernels.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "accelerate", "matplotlib")


def add_doctor(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "doctor",
        parents=[common],
        help="versions, GPU, backends and why one is missing",
        description="What is installed here, which backends can run, and why the others cannot.",
    )
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    rows = {"grasp_kernels": __version__, "python": platform.python_version()}
    rows.update({package: _installed(package) for package in _PACKAGES})
    rows["GPU"] = _gpu()
    extension = find_spec("grasp_kernels._host") is not None
    rows["compiled extension"] = "there" if extension else "not built (works without)"

    from grasp_kernels import backends

    for name, reason in backends().items():
        rows[f"backend {name}"] = "runs" if reason is None else f"does not run: {reason}"
    rows["backend auto"] = _auto()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _auto() -> str:
    import torch

    from grasp_kernels.ops.lora_linear import measured

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if measured.prefers_kernels(where):
        return "takes kernels for the shapes on which they were measured to be the fastest"
    return "takes aten: no kernel was measured to be faster here"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"none in use (torch was built for {torch.version.cuda or 'CPU only'})"
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return f"{', '.join(names)}, CUDA {torch.version.cuda}"
