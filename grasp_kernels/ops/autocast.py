"""Autocast stays outside of code with dtypes chosen by hand."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Found = TypeVar("_Found")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast on a device; None without autocast and on meta tensors."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(run: Callable[..., _Found], x: Tensor, *others: Any) -> _Found:
    """Return `run(x, *others)` with every product in the dtype of its operands."""
    if autocast_dtype(x.device) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *others)
    return run(x, *others)
