"""The second halves of the passes: partial sums added in a fixed order, and the projections.

There are no float atomics, so a rerun gives the same bits.
Shapes: T tokens, C columns of the large operand (N of dY, K of X), R LoRA rank, Q basis size, E
rows of a skinny result.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels.ops.gpu.blocks import dot, rounded
from grasp_kernels.ops.gpu.launch import at_least_16, launch

_TOKENS = 512
_COLUMNS = 32
_TOTALS = 32  # of a program
_AT_ONCE = 64  # shares
# Loads in flight a thread: one after the other, each would wait for memory.
_UNROLL = tl.constexpr(8)


@triton.jit(do_not_specialize=["T"])
def _finish_skinny_kernel(
    parts, out, T, E, splits, n_scaled, scaling, BLOCK_T: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Compute `out[E, T] = Σ parts[split, E, T]`, times `s` in the first rows, −1 in the others."""
    if ALIGNED:  # T is not specialised: this permits the compiler to vectorise
        T = T // 16 * 16
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    acc = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, splits, _UNROLL):
        for i in tl.static_range(_UNROLL):
            split = first + i
            inside = t < tl.where(split < splits, T, 0)
            acc += tl.load(parts + (split * E + row) * T + t, mask=inside, other=0.0)
    acc *= tl.where(row < n_scaled, scaling, -1.0)
    tl.store(out + row * T + t, rounded(acc, out.dtype.element_ty), mask=t < T)


def finish_skinny(parts: Tensor, n_scaled: int, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return `[s dS | −D]ᵀ [E, T]` from float32 `parts[splits, E, T]`, the rows of dS first."""
    splits, E, T = parts.shape
    out = parts.new_empty(E, T, dtype=dtype)
    launch(
        _finish_skinny_kernel,
        (triton.cdiv(T, _TOKENS), E),
        parts,
        parts=parts, out=out, T=T, E=E, splits=splits, n_scaled=n_scaled, scaling=scaling,
        BLOCK_T=_TOKENS, ALIGNED=T % 16 == 0,
    )  # fmt: skip
    return out


@triton.jit
def _total_kernel(
    shares, out, n_shares, size, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """Compute `out[size] = Σ shares[·, size]`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((AT_ONCE, BLOCK), tl.float32)
    for first in range(0, n_shares, AT_ONCE):
        i = first + tl.arange(0, AT_ONCE).to(tl.int64)
        inside = (i[:, None] < n_shares) & (at[None, :] < size)
        acc += tl.load(shares + i[:, None] * size + at[None, :], mask=inside, other=0.0)
    tl.store(out + at, tl.sum(acc, axis=0), mask=at < size)


def total(shares: Tensor) -> Tensor:
    """Return `Σ shares [Q, R]` of float32 `shares[programs, Q, R]`.

    This is a separate launch: otherwise every program of `_finish_factor_kernel` would add all
    shares again (966 µs instead of a few, R = 64, 14336 columns, H100).
    """
    n_shares, Q, R = shares.shape
    out = shares.new_empty(Q, R)
    launch(
        _total_kernel,
        (triton.cdiv(Q * R, _TOTALS),),
        shares,
        shares=shares, out=out, n_shares=n_shares, size=Q * R, BLOCK=_TOTALS, AT_ONCE=_AT_ONCE,
    )  # fmt: skip
    return out


@triton.jit
def _finish_factor_kernel(
    parts, basis, share, out, splits, C, R, Q, scaling,
    stride_bc, stride_bq, stride_oc, stride_or,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    """Compute `out[C, R] = s (I − V Vᵀ) Σ parts[split, C, R]` from `share[Q, R] = Vᵀ Σ parts`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (c[:, None] < C) & (r[None, :] < R)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for first in range(0, splits, _UNROLL):
        for i in tl.static_range(_UNROLL):
            split = first + i
            at = (split * C + c[:, None]) * R + r[None, :]
            there = inside & (c[:, None] < tl.where(split < splits, C, 0))
            acc += tl.load(parts + at, mask=there, other=0.0)
    if PROJECT:
        for q0 in range(0, Q, BLOCK_Q):
            q = q0 + tl.arange(0, BLOCK_Q)
            own = tl.load(
                share + q[:, None] * R + r[None, :],
                mask=(q[:, None] < Q) & (r[None, :] < R),
                other=0.0,
            )
            v = tl.load(
                basis + c[:, None] * stride_bc + q[None, :] * stride_bq,
                mask=(c[:, None] < C) & (q[None, :] < Q),
                other=0.0,
            )
            acc = dot(-v, own, acc, False)
    to = out + c[:, None] * stride_oc + r[None, :] * stride_or
    tl.store(to, rounded(acc * scaling, out.dtype.element_ty), mask=inside)


def finish_factor(
    sums: Tensor, share: Tensor | None, basis: Tensor | None, scaling: float, out: Tensor
) -> None:
    """Write `s (I − V Vᵀ) Σ sums` into `out[C, R]`, any strides and dtype.

    Args:
        sums: float32 `[splits, C, R]`.
        share: float32 `[Q, R]`, `Vᵀ Σ sums`; None without a basis.
        basis: `V[C, Q]` float32, or None.
    """
    splits, C, R = sums.shape
    block_r = min(64, at_least_16(R))
    basis_strides = (0, 0) if basis is None else basis.stride()
    launch(
        _finish_factor_kernel,
        (triton.cdiv(C, _COLUMNS), triton.cdiv(R, block_r)),
        sums,
        parts=sums, basis=basis, share=share, out=out, splits=splits, C=C, R=R,
        Q=0 if basis is None else basis.shape[1], scaling=scaling,
        stride_bc=basis_strides[0], stride_bq=basis_strides[1],
        stride_oc=out.stride(0), stride_or=out.stride(1),
        BLOCK_C=_COLUMNS, BLOCK_R=block_r, BLOCK_Q=16, PROJECT=basis is not None,
    )  # fmt: skip
