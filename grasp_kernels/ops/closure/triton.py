"""All factors of a model in two launches, driven by a table of pointers on the device.

    shares   M V of the factors that are projected, in float32, one part a range of columns
    close    M (I − V Vᵀ) from the sum of the parts, in the dtype of the layers

A program has few columns, so that what a launch takes is one trip to memory, not a row's length of
them (one projected factor of 4096 columns, a program each: 166 µs on an H100). The table is made
once for a set of parameters and bases, whose addresses stay the same from step to step; a launch
then copies nothing to the device and waits for nothing. Results are slices of one new buffer: a
backward that still holds the last one is not disturbed.
Shapes: a factor is `[R, C]`, R LoRA rank and C features, P basis size.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels.ops.gpu.blocks import rounded
from grasp_kernels.ops.gpu.launch import at_least_16, kernel_support, launch

if TYPE_CHECKING:
    from grasp_kernels.ops.closure.api import Factor

unsupported = kernel_support

_ROWS = 16
_COLUMNS = 128  # at once
_RANGE = 256  # of a program
_FIELDS = 17
_POINTED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_PARTS = tl.constexpr(8)  # loaded at once


@triton.jit
def _pointers(work, FACTOR: tl.constexpr, FIELDS: tl.constexpr):  # fmt: skip
    """The program's line of the table, its factor and basis with their strides, R and P."""
    # Offsets inside one factor fit into 32 bits; with 64 the kernel spills.
    item = work + tl.program_id(0).to(tl.int64) * FIELDS
    factor = tl.load(item).to(tl.pointer_type(FACTOR))
    basis = tl.load(item + 1).to(tl.pointer_type(tl.float32))
    R = tl.load(item + 3).to(tl.int32)
    stride_r = tl.load(item + 4).to(tl.int32)
    stride_c = tl.load(item + 5).to(tl.int32)
    stride_bc = tl.load(item + 6).to(tl.int32)
    stride_bp = tl.load(item + 7).to(tl.int32)
    P = tl.load(item + 8).to(tl.int32)
    first = tl.load(item + 9).to(tl.int32)
    last = tl.load(item + 10).to(tl.int32)
    r0 = tl.load(item + 13).to(tl.int32)
    return item, factor, basis, R, stride_r, stride_c, stride_bc, stride_bp, P, first, last, r0


@triton.jit
def _shares_kernel(
    work, shares,
    FACTOR: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`shares[program, BLOCK_R, BLOCK_P] = M V` over a range of columns of a row block."""
    _, factor, basis, R, stride_r, stride_c, stride_bc, stride_bp, P, first, last, r0 = _pointers(
        work, FACTOR, FIELDS
    )
    r = r0 + tl.arange(0, BLOCK_R)
    p = tl.arange(0, BLOCK_P)
    share = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    for c0 in range(first, last, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        m = tl.load(
            factor + r[:, None] * stride_r + c[None, :] * stride_c,
            mask=(r[:, None] < R) & (c[None, :] < last),
            other=0.0,
        )
        v = tl.load(
            basis + c[:, None] * stride_bc + p[None, :] * stride_bp,
            mask=(c[:, None] < last) & (p[None, :] < P),
            other=0.0,
        )
        share = tl.dot(m.to(tl.float32), v, share, input_precision="ieee")
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    tl.store(shares + rows[:, None] * BLOCK_P + p[None, :], share)


@triton.jit
def _close_kernel(
    work, shares, out,
    FACTOR: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A range of columns of one row block of one factor."""
    item, factor, basis, R, stride_r, stride_c, stride_bc, stride_bp, P, first, last, r0 = (
        _pointers(work, FACTOR, FIELDS)
    )
    # Addresses are chosen as numbers: AMD's compiler cannot follow a pointer out of a branch.
    width = out.dtype.element_ty.primitive_bitwidth // 8
    own = out.to(tl.int64) + tl.load(item + 2) * width
    given = tl.load(item + 14)
    to = tl.where(given != 0, given, own).to(out.dtype)
    to_r = tl.load(item + 11).to(tl.int32)
    to_c = tl.load(item + 12).to(tl.int32)
    part = tl.load(item + 15).to(tl.int32)
    n_parts = tl.load(item + 16).to(tl.int32)
    r = r0 + tl.arange(0, BLOCK_R)
    p = tl.arange(0, BLOCK_P)
    share = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    own_r = tl.arange(0, BLOCK_R)
    for start in range(0, n_parts, _PARTS):
        i = start + tl.arange(0, _PARTS)
        at = (part + i[:, None, None]) * BLOCK_R + own_r[None, :, None]
        at = at * BLOCK_P + p[None, None, :]
        parts = tl.load(shares + at, mask=i[:, None, None] < n_parts, other=0.0)
        share += tl.sum(parts, axis=0)
    for c0 in range(first, last, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (r[:, None] < R) & (c[None, :] < last)
        m = tl.load(factor + r[:, None] * stride_r + c[None, :] * stride_c, mask=inside, other=0.0)
        m = m.to(tl.float32)
        if P > 0:
            v = tl.load(
                basis + c[None, :] * stride_bc + p[:, None] * stride_bp,
                mask=(c[None, :] < last) & (p[:, None] < P),
                other=0.0,
            )
            m = tl.dot(-share, v, m, input_precision="ieee")
        at = to + r[:, None] * to_r + c[None, :] * to_c
        tl.store(at, rounded(m, out.dtype.element_ty), mask=inside)


class _Plan(NamedTuple):
    """The work of one launch, and the results' places in its buffer."""

    table: Tensor  # int64 [programs, _FIELDS], those that project first
    n_projected: int
    places: list[tuple[int, tuple[int, int], tuple[int, int]]]  # offset, shape, strides
    size: int
    block_p: int


# One model's adapters are one key; a process that trains one after the other needs only the last.
_plans: dict[tuple[object, ...], _Plan] = {}
_MOST_PLANS = 16


def close(factors: Sequence[Factor], dtype: torch.dtype) -> list[Tensor]:
    """`M (I − V Vᵀ) [R, C]` of every factor; two launches for each dtype among the factors."""
    results: list[Tensor | None] = [None] * len(factors)
    for kind in dict.fromkeys(factor.matrix.dtype for factor in factors):
        of_kind = [i for i, factor in enumerate(factors) if factor.matrix.dtype == kind]
        for i, closed in zip(of_kind, _close([factors[i] for i in of_kind], dtype), strict=True):
            results[i] = closed
    return results


def _close(factors: Sequence[Factor], dtype: torch.dtype) -> list[Tensor]:
    like = factors[0].matrix
    plan = _plan(factors)
    buffer = like.new_empty(plan.size, dtype=dtype)
    shares = like.new_empty(plan.n_projected, _ROWS, plan.block_p, dtype=torch.float32)
    sizes = {
        "FACTOR": _POINTED[like.dtype],
        "FIELDS": _FIELDS,
        "BLOCK_R": _ROWS,
        "BLOCK_C": _COLUMNS,
        "BLOCK_P": plan.block_p,
    }
    given = {"work": plan.table, "shares": shares}
    launch(_shares_kernel, (plan.n_projected,), buffer, 8, 1, **given, **sizes)
    launch(_close_kernel, (plan.table.shape[0],), buffer, 8, 1, **given, out=buffer, **sizes)
    return [
        buffer.as_strided(shape, strides, offset) if factor.out is None else factor.out
        for factor, (offset, shape, strides) in zip(factors, plan.places, strict=True)
    ]


def _plan(factors: Sequence[Factor]) -> _Plan:
    key = tuple(
        None if tensor is None else (tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())
        for factor in factors
        for tensor in factor
    )
    if key not in _plans:
        if len(_plans) >= _MOST_PLANS:
            _plans.pop(next(iter(_plans)))
        _plans[key] = _make_plan(factors)
    return _plans[key]


def _make_plan(factors: Sequence[Factor]) -> _Plan:
    projected: list[list[int]] = []
    others: list[list[int]] = []
    places = []
    offset = widest = 0
    for matrix, basis, out in factors:
        (R, C), (stride_r, stride_c) = matrix.shape, matrix.stride()
        by_rows = stride_c == 1 or stride_r != 1
        to_r, to_c = (C, 1) if by_rows else (1, R)
        places.append((offset, (R, C), (to_r, to_c)))
        if out is not None:
            to_r, to_c = out.stride()
        given = 0 if out is None else out.data_ptr()
        P = 0 if basis is None else basis.shape[1]
        widest = max(widest, P)
        at, *basis_strides = (0, 0, 0) if basis is None else (basis.data_ptr(), *basis.stride())
        common = [matrix.data_ptr(), at, offset, R, stride_r, stride_c, *basis_strides, P]
        rows = projected if P else others
        starts = range(0, C, _RANGE)
        for r in range(0, R, _ROWS):
            parts = [len(rows), len(starts)] if P else [0, 0]
            rows += [
                [*common, first, min(C, first + _RANGE), to_r, to_c, r, given, *parts]
                for first in starts
            ]
        if out is None:  # slices start at 16 elements, where wide loads and bulk copies can read
            offset += -(-R * C // 16) * 16
    rows = projected + others
    table = torch.tensor(rows, dtype=torch.int64).to(factors[0].matrix.device)
    return _Plan(table, len(projected), places, offset, at_least_16(max(1, widest)))
