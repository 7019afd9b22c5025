"""Tensors for the kernels by themselves, and how exact their results must be."""

import math

import torch

from grasp_kernels.ops.lora_linear.triton.dropout import Dropout
from tests.helpers.oracle import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def seeded(p: float) -> Dropout:
    return Dropout(torch.randint(0, 2**63 - 1, (1,)).to(DEVICE), p)


def assert_exact(found: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """Within float32 sums of `terms` numbers and one rounding to the dtype of the result."""
    eps = torch.finfo(found.dtype).eps
    limit = 0.5 * eps + math.sqrt(terms) * torch.finfo(torch.float32).eps
    assert relative_error(found, exact) <= limit
