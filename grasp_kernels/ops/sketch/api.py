"""The Gaussian sketch `A Ω`: checks, the seed, the choice of a backend. It imports no kernel.

Shapes: leading dimensions `...` are a batch, `M` rows, `N` columns, `L` columns of the sketch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grasp_kernels.ops import dispatch

# The kernel was never measured on a GPU, so nobody gets it who does not ask for it.
BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_COUNTERS = 2**32  # the counters of Ω are numbers of 32 bits


def gaussian_sketch(
    matrix: Tensor, size: int, generator: torch.Generator, *, backend: str = "auto"
) -> Tensor:
    """`A Ω` for a Gaussian `Ω[..., N, L]` that follows from one number drawn from the generator.

    `Ω` is computed in float32, rounded to the dtype of the matrix and never stored whole; products
    are summed in float32 (float64 for a float64 matrix). The same generator in the same state gives
    the same `Ω` on every device and in every backend, up to rounding.

    Args:
        matrix: `A[..., M, N]`, float64, float32, bfloat16 or float16, with any strides.
        size: `L`, at least 1.
        generator: one integer is drawn from it, on its device. A generator of the CPU, or of the
            device of the matrix, needs no synchronisation. A captured CUDA graph repeats the number
            of a CPU generator, and draws anew from a registered generator of the device.
        backend: "auto", "triton" or "reference"; a named one runs or raises. The gradient to the
            matrix needs the reference.

    Returns:
        `[..., M, L]`, float32, or float64 for a float64 matrix.

    Raises:
        ValueError: not such a matrix, size below 1, or a backend that cannot run.
    """
    differentiable = torch.is_grad_enabled() and matrix.requires_grad
    _check(matrix, size, differentiable and backend == "triton")
    module = dispatch.select(__package__, BACKENDS, backend, matrix.device)
    *batch, m, n = matrix.shape
    flat = matrix.reshape(math.prod(batch), m, n)
    found = module.sketch(flat, size, _draw_seed(generator, matrix.device))
    return found.view(*batch, m, size)  # type: ignore[no-any-return]


def _check(matrix: Tensor, size: int, undifferentiable: bool) -> None:
    if matrix.ndim < 2 or matrix.dtype not in _DTYPES:
        raise ValueError(
            f"A sketch needs a matrix [..., M, N] in one of {_DTYPES}, but got shape "
            f"{tuple(matrix.shape)} of {matrix.dtype}; convert it first."
        )
    if size < 1:
        raise ValueError(f"size is {size}; a sketch has at least 1 column.")
    if max(matrix.shape[-1], math.prod(matrix.shape[:-2])) >= _COUNTERS:
        raise ValueError(
            f"A matrix of shape {tuple(matrix.shape)} has 2³² columns or batch members or more, "
            "which the counters of the sketch cannot tell apart; sketch it in parts."
        )
    if undifferentiable:
        raise ValueError(
            "backend 'triton' of the sketch has no gradient, but the matrix requires one; use "
            "'reference' or detach the matrix."
        )


def _draw_seed(generator: torch.Generator, where: torch.device) -> int | Tensor:
    """63 random bits: a tensor, int64 [1], if the generator lives where the matrix does.

    Reading the number of a CPU generator waits for nothing; a GPU that is not the matrix's own is
    waited for.
    """
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device)
    return seed if seed.is_cuda and seed.device == where else int(seed)
