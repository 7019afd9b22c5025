"""The functions of `triton.passes` on CUDA C++ kernels.

Shapes: T tokens, C columns read by a pass, R LoRA rank, Q basis size, E skinny rows.
"""

from functools import lru_cache

import torch
from torch import Tensor

from grasp_kernels.ops.lora_linear.cuda.library import operators
from grasp_kernels.ops.lora_linear.triton.dropout import Dropout, drawn


def down(
    x: Tensor,
    A: Tensor,
    *,
    scaling: float = 1.0,
    n_scaled: int | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    n_scaled = A.shape[0] if n_scaled is None else n_scaled
    seed, threshold, keep = drawn(dropout)
    return operators().down(x, A, scaling * keep, n_scaled, seed, threshold)


def sums(
    z: Tensor,
    left: Tensor,
    out: Tensor,
    *,
    factor: Tensor | None = None,
    basis: Tensor | None = None,
    project: bool = False,
    scaling: float = 1.0,
    dropout: Dropout | None = None,
) -> Tensor | None:
    seed, threshold, keep = drawn(dropout)
    skinny = operators().sums(z, left, out, factor, basis, project, scaling * keep, seed, threshold)
    return None if factor is None else skinny


def one_read(z: Tensor, R: int, E: int) -> bool:
    return _one_read(capability(z.device), z.shape[1], R, E)


def capability(where: torch.device) -> int:
    """Return the major compute capability of a GPU, or that of the tests' emulator."""
    return torch.cuda.get_device_capability(where)[0] if where.type == "cuda" else 9


@lru_cache(maxsize=1024)
def _one_read(major: int, C: int, R: int, E: int) -> bool:
    """Say whether partial results cost less than a second read of `z[T, C]`.

    Written and read in float32, `parts` partial results of E rows are `8 E T parts` bytes; the
    second read is `2 T C`. A single partial result is final.
    """
    parts = operators().skinny_parts(major, C, R, E)
    return parts == 1 or (parts > 1 and 4 * E * parts <= C)
