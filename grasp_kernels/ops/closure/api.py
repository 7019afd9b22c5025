"""`M (I − V Vᵀ)` of many small matrices, in the dtype that the layers compute with.

Shapes: a factor is `[R, C]`, R LoRA rank and C features (`A` itself, `Bᵀ` as a view), P basis size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_kernels.ops import dispatch

PACKAGE = __package__
BACKENDS = ("triton", "reference")


class Factor(NamedTuple):
    """One factor `[R, C]` of any strides, and the float32 basis `[C, P]` it is kept out of.

    The result goes into `out[R, C]`, any strides, if that is given, else into new memory.
    """

    matrix: Tensor
    basis: Tensor | None
    out: Tensor | None = None


def close(factors: Sequence[Factor], dtype: torch.dtype, *, backend: str) -> list[Tensor]:
    """`M (I − V Vᵀ)`, projected in float32 and rounded to `dtype`; new ones with strides as `M`'s.

    All factors are on one device. The Triton backend makes one launch for all of them.
    """
    if not factors:
        return []
    module = dispatch.select(PACKAGE, BACKENDS, backend, factors[0].matrix.device)
    closed: list[Tensor] = module.close(factors, dtype)
    return closed
