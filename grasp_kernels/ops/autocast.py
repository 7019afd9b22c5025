"""Autocast stays outside of what chooses its dtypes by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Found = TypeVar("_Found")


def without_autocast(run: Callable[..., _Found], x: Tensor, *others: Any) -> _Found:
    """`run(x, *others)`, whose products have the dtype of their operands."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *others)
    return run(x, *others)
