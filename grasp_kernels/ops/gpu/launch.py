"""The part under a kernel, the launch of a kernel, and a dry run, which only records launches.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

# Triton's own switch, read once: kernels are made for the interpreter or for a GPU when decorated.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


class Part(NamedTuple):
    """Hold the properties of a GPU for the launch tables."""

    shared_memory: int  # bytes that one program may use
    multiprocessors: int
    tma: bool  # tensor descriptors are copied by hardware


# Shared memory limits by compute capability, from the CUDA programming guide's table of technical
# specifications; gfx942 has 64 KB of LDS a work group.
PARTS = {
    "sm_80": Part(163 << 10, 108, tma=False),
    "sm_90": Part(227 << 10, 132, tma=True),
    "sm_100": Part(227 << 10, 148, tma=True),
    "sm_120": Part(99 << 10, 188, tma=True),
    "gfx942": Part(64 << 10, 304, tma=False),
}
# With few multiprocessors small tests loop: several tiles and several blocks of tokens a program.
_INTERPRETER = Part(227 << 10, 6, tma=True)


class Launch(NamedTuple):
    """Hold the arguments of one kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass
class DryRun:
    """Hold launches on meta tensors for a part, present or not."""

    part: Part
    launches: list[Launch] = field(default_factory=list)


_dry_runs: list[DryRun] = []


@contextmanager
def dry_run(part: Part) -> Iterator[DryRun]:
    """Record kernels called on meta tensors for `part` instead of running them."""
    _dry_runs.append(DryRun(part))
    try:
        yield _dry_runs[-1]
    finally:
        _dry_runs.pop()


def part_of(where: torch.device) -> Part:
    """Return the part behind a device."""
    if where.type == "meta":
        return _dry_runs[-1].part
    if where.type == "cpu":
        return _INTERPRETER
    return _cuda_part(torch.cuda.current_device() if where.index is None else where.index)


@cache
def _cuda_part(index: int) -> Part:
    properties = torch.cuda.get_device_properties(index)
    limits = driver.active.utils.get_device_properties(index)
    return Part(
        limits["max_shared_mem"],
        properties.multi_processor_count,
        tma=torch.version.hip is None and properties.major >= 9,
    )


def kernel_support(where: torch.device) -> str | None:
    """Say why kernels cannot run on a device without a GPU or Triton's interpreter, or None."""
    if INTERPRETED.value:
        return None if where.type == "cpu" else "Triton's interpreter runs only on a CPU"
    if where.type != "cuda":
        return "it needs a GPU (on a CPU only Triton's interpreter runs kernels)"
    if torch.version.hip is None and torch.cuda.get_device_capability(where) < (8, 0):
        major, minor = torch.cuda.get_device_capability(where)
        return f"it needs compute capability 8.0 or newer and this GPU has {major}.{minor}"
    return None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    like: Tensor,
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    **arguments: Any,
) -> None:
    """Run `kernel` on the device of `like`, on its current stream; empty grids are skipped."""
    if 0 in grid:
        return
    if like.is_meta:
        made = Launch(kernel, grid, arguments, num_warps, num_stages)
        _dry_runs[-1].launches.append(made)
    elif like.is_cuda:
        with torch.cuda.device(like.device):
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
    else:
        kernel[grid](**arguments)


def at_least_16(size: int) -> int:
    """Return the next power of two, 16 at least, for a side of a matrix instruction."""
    return max(16, 1 << (size - 1).bit_length())


def exact_float32() -> bool:
    """Say whether float32 products must be exact: torch's switch for TF32; AMD has no TF32."""
    return torch.version.hip is not None or torch.get_float32_matmul_precision() == "highest"


def copies_in_bulk(part: Part, *matrices: Tensor) -> bool:
    """Say whether the copy engine of a part can move blocks of all these matrices.

    The engine takes rows at multiples of 16 bytes. Ordinary loads do for float32: its products
    without matrix instructions are not bound by copies.
    """
    for matrix in matrices:
        row_bytes = matrix.stride(0) * matrix.element_size()
        aligned = row_bytes > 0 and row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0
        contiguous = matrix.stride(1) == 1 and matrix.numel() > 0
        if not (matrix.element_size() == 2 and contiguous and aligned):
            return False
    return part.tma
