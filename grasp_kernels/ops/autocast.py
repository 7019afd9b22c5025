"""Autocast stays outside of what chooses its dtypes by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Found = TypeVar("_Found")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on a device; None outside of it, and where there is no data (meta)."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(run: Callable[..., _Found], x: Tensor, *others: Any) -> _Found:
    """`run(x, *others)`, whose products have the dtype of their operands."""
    if autocast_dtype(x.device) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *others)
    return run(x, *others)
