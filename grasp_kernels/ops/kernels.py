"""The modules of kernels, where Triton is there and a device runs them."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch


def kernels_on(where: torch.device, name: str) -> Any:
    """Return the module of `ops.gpu` with this name, or None if its kernels cannot run there."""
    module = load(name)
    return module if module is not None and module.kernel_support(where) is None else None


@cache
def load(name: str) -> Any:
    """Return a module of `ops.gpu`, or None without Triton."""
    try:
        return importlib.import_module(f"grasp_kernels.ops.gpu.{name}")
    except ImportError:
        return None
