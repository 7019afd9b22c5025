"""The gradient pass and the input pass: all results of one read of `dY`, or of `X`.

    gradient pass, Z = dY:  [dS | D] = dY [s B̂ | V]   and   dB = (I − V Vᵀ) s dYᵀ S
    input pass,    Z = X̃:                                    dA = dSᵀ X̃

Both are a sum over tokens, `M[C, R] = Σ_t Z[t, C] L[R, t]`. The accumulator stays in registers
while a program runs down its tokens; the gradient pass multiplies the same block of `dY` by the
skinny factors too. A program owns a slab of columns and a range of tokens, so there is one `M` a
range and one `[dS | D]` a slab; `reduce` adds them in a fixed order. The share of the basis in a
program's `M`, `Vᵀ M [Q, R]`, is computed in float32 after its last token: the projection costs
neither a pass nor a launch.

Bytes besides the one read of `Z`, for 8192 × 4096 two-byte elements (64 MB), R + Q = 20, slabs of
256: 10.5 MB of `[dS | D]` parts and 2.1 MB of `M` parts, written and read once, in the L2.
Shapes: T tokens, C columns of `Z` (N of dY, K of X), R LoRA rank, Q basis size.
"""

# mypy: ignore-errors

from functools import lru_cache
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


class Slab(NamedTuple):
    """Hold the block sizes of one program and its scheduling."""

    t: int
    c: int
    r: int
    num_warps: int
    num_stages: int
    wide: bool = False


def slab_for(part: Part, itemsize: int, R: int, skinny: bool, tma: bool = True) -> Slab:
    """Return the slab of a part for rank `R` and elements of `itemsize` bytes.

    Fourteen others were no better on Hopper (`benchmarks/NOTES.md`), no other part was measured.
    Chosen so that no register spills (`benchmarks/results/kernel-resources.csv`): where matrix
    instructions read registers, as on all but Hopper and datacentre Blackwell, the skinny factors
    of a slab stay in them through the loop. Without TMA only the wide form is pipelined.
    """
    r = min(128, at_least_16(R))
    if itemsize == 4:
        return Slab(32, 32, r, 4, 2) if r <= 16 else Slab(16, 64, min(r, 64), 8, 2)
    if part.tma and not tma:  # element by element, which takes most of the registers
        return Slab(64, 128, min(r, 64), 8, 3)
    if part.shared_memory >= 227 << 10:
        return Slab(64, 256 if r <= 32 else 128, r, 8, 4)
    if part.shared_memory < 99 << 10:
        return Slab(64, 128, min(r, 64), 8, 1)
    if part.tma:
        return Slab(64, 128, r, 8, 3) if r <= 32 or not skinny else Slab(32, 64, r, 8, 3)
    return Slab(64, 128 if r <= 16 or not skinny else 64, r, 8, 4, wide=True)


def one_read(z: Tensor, R: int, E: int) -> bool:
    """Say whether parts of `[dS | D][E, T]`, one a slab, cost less than a reread of `z[T, C]`.

    Written and read in float32 they are `8 E T C / c` bytes, the second read is `2 T C`.
    """
    part = part_of(z.device)
    slab = slab_for(part, z.element_size(), R, skinny=E > 0, tma=copies_in_bulk(part, z))
    return slab.c >= 4 * E


@triton.jit(do_not_specialize=["T", "blocks"])
def _token_pass_kernel(
    z, left, factor, basis, sums, shares, skinny, seed,
    T, C, R, Q, E, blocks, threshold,
    stride_zt, stride_zc, stride_fc, stride_fr, stride_bc, stride_bq,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    PROJECT: tl.constexpr, SHARES: tl.constexpr, CHUNK: tl.constexpr,
    TMA: tl.constexpr, EVEN_C: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, DROPOUT: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Compute one slab of columns of `z[T, C]`, one range of tokens, one block of ranks.

    `sums[split, C, R] = z̃ᵀ leftᵀ` for `left[R, T]`, and with SHARES the share of `basis[C, Q]` in
    them, `shares[slab, split, Q, R]`: the projection needs all of `C`, so the reduction does it.
    If BLOCK_E, also `skinny[slab, E, T] = [factor | basis]ᵀ zᵀ` in one product, where E is R + Q,
    or R without PROJECT.
    """
    if ALIGNED:  # T is not specialised: this permits the compiler to vectorise
        T = T // 16 * 16
    slab = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    block_r = tl.program_id(2)
    c0 = tl.program_id(0) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
    r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_c = (c < C) | EVEN_C
    if BLOCK_E > 0:
        e = tl.arange(0, BLOCK_E)
        thin = tl.load(
            factor + c[:, None] * stride_fc + e[None, :] * stride_fr,
            mask=(c[:, None] < C) & (e[None, :] < R),
            other=0.0,
        )
        if PROJECT:
            q = e - R
            v = tl.load(
                basis + c[:, None] * stride_bc + q[None, :] * stride_bq,
                mask=(c[:, None] < C) & (q[None, :] >= 0) & (q[None, :] < Q),
                other=0.0,
            )
            thin = tl.where(e[None, :] < R, thin, rounded(v, thin.dtype))
        skinny += slab * E * T
        rows_e = tl.where(block_r == 0, E, 0)  # one block of ranks writes it
    if WIDE:
        acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    else:
        acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)

    first = tl.program_id(1) * blocks * BLOCK_T  # a visible multiple, or loads would not be wide
    for t0 in range(first, min(T, first + blocks * BLOCK_T), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        if TMA:
            block = z.load([t0, c0])
        else:
            block = tl.load(
                z + t[:, None].to(tl.int64) * stride_zt + c[None, :] * stride_zc,
                mask=(t[:, None] < T) & inside_c[None, :],
                other=0.0,
            )
        if DROPOUT:
            keep = kept(tl.load(seed), t.to(tl.int64), c0, tl.cdiv(C, 8), threshold, BLOCK_C)
            block = tl.where(keep, block, 0.0).to(block.dtype)
        rows = tl.load(
            left + (r[:, None] * T + t[None, :]),
            mask=(r[:, None] < R) & (t[None, :] < T),
            other=0.0,
        )
        acc = dot(rows, block, acc, TF32) if WIDE else dot(block.T, rows.T, acc, TF32)
        if BLOCK_E > 0:
            product = dot(block, thin, tl.zeros((BLOCK_T, BLOCK_E), tl.float32), TF32)
            tl.store(
                skinny + (e[None, :] * T + t[:, None]),
                product,
                mask=(t[:, None] < T) & (e[None, :] < rows_e),
            )

    if WIDE:
        acc = acc.T
    inside = (c[:, None] < C) & (r[None, :] < R)
    tl.store(sums + (split * C + c[:, None]) * R + r[None, :], acc, mask=inside)
    if SHARES:
        program = slab * tl.num_programs(1) + split
        for q0 in range(0, Q, CHUNK):  # several columns in one reduction over the warps
            p = q0 + tl.arange(0, CHUNK)
            columns = tl.load(
                basis + c[:, None] * stride_bc + p[None, :] * stride_bq,
                mask=(c[:, None] < C) & (p[None, :] < Q),
                other=0.0,
            )
            share = tl.sum(acc[:, None, :] * columns[:, :, None], axis=0)
            tl.store(
                shares + (program * Q + p[:, None]) * R + r[None, :],
                share,
                mask=(p[:, None] < Q) & (r[None, :] < R),
            )


class Partial(NamedTuple):
    """Hold the partial results for the reduction, in float32; None where not computed."""

    sums: Tensor  # [splits, C, R]
    shares: Tensor | None  # [slabs · splits, Q, R]
    skinny: Tensor | None  # [slabs, R + Q, T], or [slabs, R, T] without a projection of Z


def token_pass(
    z: Tensor,
    left: Tensor,
    *,
    factor: Tensor | None = None,
    basis: Tensor | None = None,
    project: bool = False,
    dropout: Dropout | None = None,
    slab: Slab | None = None,
    tma: bool = True,
) -> Partial:
    """Run one read of `z[T, C]`.

    Args:
        left: `L[R, T]` contiguous, in the dtype of `z`.
        factor: `[C, R]` for `factorᵀ zᵀ`, or None.
        basis: float32 `[C, Q]`, for the shares of the sums, and with `project` for `basisᵀ zᵀ`.
        dropout: of `z`; kept elements are not scaled here.
        slab, tma: a slab other than the table's, no copy engine; for tests.
    """
    (T, C), R = z.shape, left.shape[0]
    part = part_of(z.device)
    tma = tma and copies_in_bulk(part, z)
    Q = 0 if basis is None else basis.shape[1]
    E = 0 if factor is None else R + (Q if project else 0)
    slab = slab or slab_for(part, z.element_size(), R, skinny=E > 0, tma=tma)
    slabs, blocks = triton.cdiv(C, slab.c), triton.cdiv(T, slab.t)
    splits = _splits(slabs * triton.cdiv(R, slab.r), blocks, part.multiprocessors)
    new = {"dtype": torch.float32, "device": z.device}
    found = Partial(
        torch.empty(splits, C, R, **new),
        torch.empty(slabs * splits, Q, R, **new) if Q else None,
        torch.empty(slabs, E, T, **new) if factor is not None else None,
    )
    seed, threshold, _ = drawn(dropout)
    factor_strides = (0, 0) if factor is None else factor.stride()
    basis_strides = (0, 0) if basis is None else basis.stride()
    launch(
        _token_pass_kernel,
        (slabs, splits, triton.cdiv(R, slab.r)),
        z,
        num_warps=slab.num_warps, num_stages=slab.num_stages,
        z=TensorDescriptor.from_tensor(z, [slab.t, slab.c]) if tma else z,
        left=left, factor=factor, basis=basis,
        sums=found.sums, shares=found.shares, skinny=found.skinny,
        seed=seed, T=T, C=C, R=R, Q=Q, E=E, blocks=triton.cdiv(blocks, splits), threshold=threshold,
        stride_zt=z.stride(0), stride_zc=z.stride(1),
        stride_fc=factor_strides[0], stride_fr=factor_strides[1],
        stride_bc=basis_strides[0], stride_bq=basis_strides[1],
        BLOCK_T=slab.t, BLOCK_C=slab.c, BLOCK_R=slab.r, BLOCK_E=at_least_16(E) if E else 0,
        PROJECT=E > R, SHARES=found.shares is not None, CHUNK=4 if slab.r <= 16 else 1,
        TMA=tma, EVEN_C=C % slab.c == 0, ALIGNED=T % 16 == 0,
        WIDE=slab.wide, DROPOUT=dropout is not None, TF32=not exact_float32(),
    )  # fmt: skip
    return found


@lru_cache(maxsize=1024)
def _splits(slabs: int, blocks: int, multiprocessors: int) -> int:
    """Return the number of ranges of tokens, the least with equally busy multiprocessors.

    The time of the pass is the longest chain of blocks on one multiprocessor. One more range costs
    one more partial sum, counted as a block.
    """

    def cost(splits: int) -> int:
        return triton.cdiv(slabs * splits, multiprocessors) * triton.cdiv(blocks, splits) + splits

    return min(range(1, max(1, min(blocks, multiprocessors)) + 1), key=cost)
