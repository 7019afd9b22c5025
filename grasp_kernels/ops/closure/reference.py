"""The SPECIFICATION of closing many factors: one by one. Shapes as in api.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grasp_kernels.ops.projection import project_rows

if TYPE_CHECKING:
    from grasp_kernels.ops.closure.api import Factor


def unsupported(where: torch.device) -> str | None:
    """Library calls run everywhere."""
    return None


def close(factors: Sequence[Factor], dtype: torch.dtype) -> list[Tensor]:
    """`M (I − V Vᵀ) [R, C]` of every factor."""
    closed = []
    for matrix, basis, out in factors:
        place = torch.empty_like(matrix, dtype=dtype) if out is None else out
        closed.append(place.copy_(project_rows(matrix, basis)))
    return closed
