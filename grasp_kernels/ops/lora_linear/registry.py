"""The backends of the operator: which there are, which can run, and the one for a call.

Shapes: T tokens, K in.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from grasp_kernels.ops import dispatch
from grasp_kernels.ops.lora_linear import measured
from grasp_kernels.ops.lora_linear.operands import Operands

PACKAGE = __package__  # where the backends are
KERNELS = ("cuda", "triton")
BACKENDS = (*KERNELS, "aten", "reference")  # the reference is last and runs everywhere


def backends(where: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend with None if it can run on the device, else the reason why it cannot."""
    if where is None:
        where = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: dispatch.why_not(PACKAGE, name, torch.device(where)) for name in BACKENDS}


def computes(backend: str, dtype: torch.dtype) -> bool:
    """Whether a backend, if it is here, computes with activations of a dtype."""
    module = dispatch.load(PACKAGE, backend)
    return isinstance(module, str) or dtype in module.DTYPES


def select(backend: str, x: Tensor, op: Operands) -> ModuleType:
    """The backend for `x[T, K]`; forward and backward see the same shapes and so agree."""
    if backend == "auto":
        order: Sequence[str] = measured.order(x, op)
    else:
        order = BACKENDS
    return dispatch.select(PACKAGE, order, backend, x.device, x, op)
