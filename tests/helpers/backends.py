"""Where the backends of the operator run on this machine, and what they are given."""

from dataclasses import replace

import pytest
import torch

from grasp_kernels.ops import backends
from grasp_kernels.ops.lora_linear.operands import Operands
from grasp_kernels.ops.lora_linear.registry import BACKENDS, computes
from tests.helpers.oracle import Case

DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
PLACES = [(b, d) for b in BACKENDS for d in DEVICES if backends(d)[b] is None]
everywhere = pytest.mark.parametrize(("backend", "device"), PLACES)


def suited(case: Case, backend: str) -> Case:
    """The case, in a dtype that the backend computes."""
    return case if computes(backend, case.dtype) else replace(case, dtype=torch.bfloat16)


def operands(K: int, N: int, R: int, Q: int = 0) -> Operands:
    """A layer of these sizes that nobody computes."""
    factors, basis = (torch.empty(R, K), torch.empty(N, R)), torch.empty(N, Q) if Q else None
    return Operands(torch.empty(N, K), None, *factors, None, basis, None, 1.0, 0.0, True, True)
