"""The compiled operators `torch.ops.grasp_kernels_cuda`, loaded when they are first needed."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

import grasp_kernels


def load(path: Path) -> None:
    """Register the operators of a library; one a process."""
    torch.ops.load_library(str(path))
    why_not.cache_clear()


@cache
def why_not() -> str | None:
    """Register the operators if that is possible and not yet done; say why not, or None."""
    if hasattr(torch.ops.grasp_kernels_cuda, "sums"):
        return None
    path = Path(grasp_kernels.__file__).with_name("_C.so")  # built with this package
    if not path.exists():
        return "its extension was not built (it is where pip finds nvcc)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"its extension cannot be loaded ({error})"
    return None


def operators() -> Any:
    """Return the namespace of the registered operators."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the CUDA kernels are not available: {reason}.")
    return torch.ops.grasp_kernels_cuda
