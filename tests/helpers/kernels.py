"""Tensors for the kernels by themselves, and how exact their results must be."""

import math

import torch

from grasp_kernels.ops.lora_linear.triton.down import down
from grasp_kernels.ops.lora_linear.triton.dropout import Dropout
from tests.helpers.oracle import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def seeded(p: float) -> Dropout:
    return Dropout(torch.randint(0, 2**63 - 1, (1,)).to(DEVICE), p)


def keep_mask(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """What the kernels keep of `x[T, K]`, bool `[T, K]`: what is left of ones."""
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return down(torch.ones_like(x), one, dropout=Dropout(seed, p)).mT != 0


def assert_exact(found: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """Within float32 sums of `terms` numbers and one rounding to the dtype of the result."""
    eps = torch.finfo(found.dtype).eps
    limit = 0.5 * eps + math.sqrt(terms) * torch.finfo(torch.float32).eps
    assert relative_error(found, exact) <= limit
