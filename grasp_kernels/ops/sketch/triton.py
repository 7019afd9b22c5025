"""The sketch in one kernel: a block of `Ω` is made in registers and multiplied with a tile of `A`.

The numbers are those of reference.py. Nothing but `A` is read and nothing but the result is
written; a matrix with few rows is split along `N` and its partial sums are added in a fixed order.
Shapes: `B` batch members, `M` rows, `N` columns, `L` columns of the sketch.
"""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels.ops.gpu.blocks import rounded
from grasp_kernels.ops.gpu.launch import INTERPRETED, kernel_support, launch, part_of

unsupported = kernel_support


@dataclass(frozen=True)
class Tile:
    """Rows and columns of `A` and columns of the sketch in one program, and its schedule."""

    m: int
    n: int
    l: int
    num_warps: int
    num_stages: int


def sketch(matrix: Tensor, size: int, seed: int | Tensor) -> Tensor:
    """`A Ω`, `[B, M, L]` from `A[B, M, N]`; nothing here waits for the device."""
    B, M, N = matrix.shape
    if isinstance(seed, int):
        seed = torch.full((1,), seed, device=matrix.device)
    precision = dot_precision(matrix.dtype)
    tile = tile_for(matrix.dtype, size, precision)
    blocks_m, blocks_l = triton.cdiv(M, tile.m), triton.cdiv(size, tile.l)
    tiles = B * blocks_m * blocks_l
    steps, parts = _parts(tiles, triton.cdiv(N, tile.n), part_of(matrix.device).multiprocessors)
    work = torch.promote_types(matrix.dtype, torch.float32)
    partial = torch.empty(parts, B, M, size, dtype=work, device=matrix.device)
    launch(
        sketch_kernel,
        (tiles * parts,),
        matrix,
        tile.num_warps,
        tile.num_stages,
        matrix=matrix,
        seed=seed,
        partial=partial,
        M=M,
        N=N,
        L=size,
        stride_b=matrix.stride(0),
        stride_m=matrix.stride(1),
        stride_n=matrix.stride(2),
        blocks_m=blocks_m,
        blocks_l=blocks_l,
        members=B,
        steps=steps,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_L=tile.l,
        PRECISION=precision,
    )
    return partial[0] if parts == 1 else partial.sum(dim=0)


def _parts(tiles: int, blocks_n: int, multiprocessors: int) -> tuple[int, int]:
    """Blocks of columns in a part, and parts.

    Two programs a multiprocessor hide each other's Philox; a part shorter than four blocks of
    columns would write about as much as it reads.
    """
    parts = max(1, min(2 * multiprocessors // max(1, tiles), blocks_n // 4))
    steps = triton.cdiv(blocks_n, parts)
    return steps, max(1, triton.cdiv(blocks_n, max(1, steps)))


def dot_precision(dtype: torch.dtype) -> str:
    """tf32 where torch allows it and the part has it; AMD's compilers take it on gfx942 alone."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed and torch.version.hip is None else "ieee"


def tile_for(dtype: torch.dtype, size: int, precision: str) -> Tile:
    """The tile of a dtype: the tallest that spills no register on any part; none is timed yet.

    Every block of rows makes its own Ω, about 35 instructions an entry (a prediction), so tall
    tiles pay. Products without matrix instructions keep both operands in registers.
    """
    columns = max(16, min(triton.next_power_of_2(size), 32 if dtype == torch.float64 else 64))
    if dtype == torch.float64:
        return Tile(32, 16, columns, 4, 2)
    if precision == "tf32":
        return Tile(128, 32, columns, 8 if columns > 16 else 4, 3)
    if dtype == torch.float32:
        return Tile(64, 16, columns, 8 if columns > 32 else 4, 2)
    return Tile(128, 64, columns, 8 if columns > 16 else 4, 3)


# M and N stay specialised: only if 16 divides them are the masked loads of bf16 asynchronous copies
# (sm_90: 24 LDGSTS against none). The others would only multiply the forms to compile.
@triton.jit(do_not_specialize=["L", "blocks_m", "blocks_l", "members", "steps"])
def sketch_kernel(
    matrix,
    seed,
    partial,
    M,
    N,
    L,
    stride_b,
    stride_m,
    stride_n,
    blocks_m,
    blocks_l,
    members,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`partial[s, b] = A[b][:, part s] Ω[b][part s]` for a tile of rows and of sketch columns."""
    program = tl.program_id(0).to(tl.int64)
    m = (program % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    program //= blocks_m
    first_l = (program % blocks_l) * BLOCK_L
    program //= blocks_l
    b = program % members
    part = program // members

    key = tl.load(seed)
    groups = (first_l // 4 + tl.arange(0, BLOCK_L // 4)).to(tl.uint32)
    rows = matrix + b * stride_b + m[:, None] * stride_m
    work = tl.float64 if matrix.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_L], work)
    first_n = part * steps * BLOCK_N + tl.arange(0, BLOCK_N)
    for step in tl.range(0, steps):
        n = first_n + step * BLOCK_N
        mask = (m[:, None] < M) & (n[None, :] < N)
        tile = tl.load(rows + n[None, :] * stride_n, mask=mask, other=0.0)
        test = rounded(gaussian(key, n.to(tl.uint32), b.to(tl.uint32), groups), tile.dtype)
        if INTERPRETED:  # which multiplies bfloat16 wrongly
            tile, test = tile.to(work), test.to(work)
        total = tl.dot(tile, test, total, input_precision=PRECISION, out_dtype=work)

    columns = first_l + tl.arange(0, BLOCK_L)
    offsets = ((part * members + b) * M + m[:, None]) * L + columns[None, :]
    tl.store(partial + offsets, total, mask=(m[:, None] < M) & (columns[None, :] < L))


@triton.jit
def gaussian(key, n, b, groups):
    """`Ω[b, n, l]`, float32 `[BLOCK_N, 4 G]`, from counters `(g, n, b, 0)`, uint32.

    Made as its transpose: tf32 products on sm_90 want it so, and Triton's compiler ends the process
    over the reshaped block otherwise.
    """
    g = tl.broadcast_to(groups[:, None], [groups.shape[0], n.shape[0]])
    zero = tl.zeros_like(g)
    w0, w1, w2, w3 = tl.philox(key, g, zero + n[None, :], zero + b, zero)
    z0, z1 = normals(w0, w1)
    z2, z3 = normals(w2, w3)
    pairs = tl.permute(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (0, 2, 3, 1))
    return tl.trans(tl.reshape(pairs, [4 * groups.shape[0], n.shape[0]]))


@triton.jit
def normals(even, odd):
    """Box and Muller's pair from two words, as in reference.py."""
    uniform = (even & 0x7FFFFFFF).to(tl.float32) * 2.0**-31 + 2.0**-32
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    cosine, sine = turned(odd)
    return radius * cosine, radius * sine


@triton.jit
def turned(angle):
    """Cosine and sine of `2π 2⁻³² angle`, uint32.

    By the nearest quarter turn and the Taylor series of the rest, at most an eighth of a turn,
    whose next terms are below 3e-8. The library's functions reduce any angle and take 32 bytes of
    local memory a thread for it on sm_90.
    """
    quarter = (angle + 0x20000000) >> 30
    rest = (angle - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32)
    x = rest * 1.4629180792671596e-09  # π 2⁻³¹
    y = x * x
    s = x + x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
    c = 1.0 + y * (-0.5 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    swapped = (quarter & 1) == 1
    cosine, sine = tl.where(swapped, s, c), tl.where(swapped, c, s)
    return (
        tl.where(((quarter + 1) & 2) == 2, -cosine, cosine),
        tl.where((quarter & 2) == 2, -sine, sine),
    )
