"""The down pass: `S = A X̃ᵀ [R, T]` in one read of `X`.

It also computes `[dS | −D]` where the gradient pass reads `dY` twice (see `tokens`). A program owns
a block of tokens and runs along `K`. Where few tokens leave multiprocessors idle, several programs
share a block of tokens, and `reduce` adds their parts in a fixed order. The factors of several
adapters on the same `X` (q, k, v; gate, up), stacked to `[ΣR, K]`, are one adapter here: one read
of `X` serves them all.
Shapes: T tokens, K in, R LoRA rank (or the sum of ranks of a group).
"""

# mypy: ignore-errors

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grasp_kernels.ops.gpu.blocks import dot, rounded
from grasp_kernels.ops.gpu.launch import (
    Part,
    at_least_16,
    copies_in_bulk,
    exact_float32,
    launch,
    part_of,
)
from grasp_kernels.ops.lora_linear.triton.dropout import Dropout, drawn, kept
from grasp_kernels.ops.lora_linear.triton.reduce import finish_skinny


class DownTile(NamedTuple):
    """Hold the block sizes of one program and its scheduling."""

    t: int
    k: int
    r: int
    num_warps: int
    num_stages: int


def tile_for(part: Part, itemsize: int, tma: bool, R: int) -> DownTile:
    """Return the tile of a part for rank `R` and elements of `itemsize` bytes.

    A multiprocessor hides the latency of memory with about 24 KB in flight (3 MB chip-wide on a
    Hopper); a stage of 64 × 128 two-byte elements is 16 KB, so four stages are ample. Eight
    other tiles were no better on Hopper (`benchmarks/NOTES.md`); elsewhere nothing was measured.
    """
    r = min(128, at_least_16(R))
    if itemsize == 4:
        return DownTile(32, 32, min(r, 64), 4 if r <= 32 else 8, 2)
    stages = 4 if r <= 64 else 3
    if part.tma and not tma:  # element by element, which takes most of the registers
        return DownTile(64, 32, min(r, 64), 4, 3)
    if part.shared_memory >= 163 << 10:
        return DownTile(64, 128, r, 4, stages)
    if part.shared_memory >= 99 << 10:
        return DownTile(64, 64, r, 4, stages)
    return DownTile(64, 64, r, 4, 2)


@triton.jit(do_not_specialize=["T"])
def _down_kernel(
    x, A, out, seed, T, K, R, k_split, threshold, n_scaled, scaling,
    stride_xt, stride_xk, stride_ar, stride_ak,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, ALIGNED: tl.constexpr,
    DROPOUT: tl.constexpr, SCALE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Compute `out[split, R, T] = A[R, k] x[T, k]ᵀ` over the columns `k` of the split.

    The first `n_scaled` rows are multiplied by `scaling`, the others by −1, if SCALE.
    """
    if ALIGNED:  # T is not specialised: this permits the compiler to vectorise
        T = T // 16 * 16
    t0 = tl.program_id(0) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    split = tl.program_id(2)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for k0 in range(split * k_split, min(K, (split + 1) * k_split), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (k < K) | EVEN_K
        if TMA:
            block = x.load([t0, k0])
        else:
            block = tl.load(
                x + t[:, None] * stride_xt + k[None, :].to(tl.int64) * stride_xk,
                mask=(t[:, None] < T) & inside[None, :],
                other=0.0,
            )
        if DROPOUT:
            keep = kept(tl.load(seed), t, k0, tl.cdiv(K, 8), threshold, BLOCK_K)
            block = tl.where(keep, block, 0.0).to(block.dtype)
        factor = tl.load(
            A + r[:, None] * stride_ar + k[None, :] * stride_ak,
            mask=(r[:, None] < R) & inside[None, :],
            other=0.0,
        )
        acc = dot(block, factor.T, acc, TF32)
    if SCALE:
        acc *= tl.where(r < n_scaled, scaling, -1.0)[None, :]
    to = out + (split.to(tl.int64) * R + r[None, :]) * T + t[:, None]
    inside_out = (t[:, None] < T) & (r[None, :] < R)
    tl.store(to, rounded(acc, out.dtype.element_ty), mask=inside_out)


def down(
    x: Tensor,
    A: Tensor,
    *,
    scaling: float = 1.0,
    n_scaled: int | None = None,
    dropout: Dropout | None = None,
    tma: bool = True,
) -> Tensor:
    """Return `s A x̃ᵀ [R, T]` in the dtype of `x[T, K]`, for `A[R, K]` in the same dtype.

    Rows from `n_scaled` on (None: there are none) come with −1 instead of `scaling`. `tma=False` is
    for tests: no copy engine.
    """
    (T, K), R = x.shape, A.shape[0]
    part = part_of(x.device)
    n_scaled = R if n_scaled is None else n_scaled
    seed, threshold, keep = drawn(dropout)
    scaling *= keep
    tma = tma and copies_in_bulk(part, x)
    tile = tile_for(part, x.element_size(), tma, R)
    blocks = triton.cdiv(T, tile.t) * triton.cdiv(R, tile.r), triton.cdiv(K, tile.k)
    splits = _splits(*blocks, part.multiprocessors)
    k_split = triton.cdiv(blocks[1], splits) * tile.k
    parts = x.new_empty(splits, R, T, dtype=torch.float32 if splits > 1 else x.dtype)
    launch(
        _down_kernel,
        (triton.cdiv(T, tile.t), triton.cdiv(R, tile.r), splits),
        x,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        x=TensorDescriptor.from_tensor(x, [tile.t, tile.k]) if tma else x,
        A=A, out=parts, seed=seed, T=T, K=K, R=R, k_split=k_split,
        threshold=threshold, n_scaled=n_scaled, scaling=scaling,
        stride_xt=x.stride(0), stride_xk=x.stride(1),
        stride_ar=A.stride(0), stride_ak=A.stride(1),
        BLOCK_T=tile.t, BLOCK_K=tile.k, BLOCK_R=tile.r,
        TMA=tma, EVEN_K=K % tile.k == 0, ALIGNED=T % 16 == 0, DROPOUT=dropout is not None,
        SCALE=splits == 1 and (scaling != 1.0 or n_scaled < R), TF32=not exact_float32(),
    )  # fmt: skip
    return parts[0] if splits == 1 else finish_skinny(parts, n_scaled, scaling, x.dtype)


def _splits(programs: int, k_blocks: int, multiprocessors: int) -> int:
    """Return the number of programs for a block of tokens: one wave, 8 blocks of K each or more.

    Fewer than 8 blocks would end before the pipeline of loads is full.
    """
    wanted = multiprocessors // max(1, programs)
    return max(1, min(wanted, k_blocks // 8))
