"""The extended product: a base GEMM with `R + Q` more reduction columns in the same accumulator.

    forward:  Y  = X Wᵀ + bias + s S° B°ᵀ
    backward: dX = dY W + mask ⊙ (dS A) + (−D) C

One persistent kernel computes both. The adapter's term comes first, and is scaled and, with
dropout, masked in the accumulator; then the projection's; then the base product. The operands of
the skinny terms are small and stay in the L2, and no separate `addmm` reads and writes the whole
result once more.

The other path is a product of the library and an `addmm`, which reads and writes the result once
more, whatever T, J and R are; but the library multiplies faster. On an H100, with T = 8192, R = 16,
in µs (library product alone, with addmm, extended): 4096→1024 93, 104, 102; 4096→4096 345, 404,
364; 4096→14336 1198, 1437, 1252; 14336→4096 1172, 1230, 1191; 8192→28672 4702, 5199, 4747;
28672→8192 4836, 4958, 4726. So such a GPU takes the extended kernel.
Shapes: T tokens, I inner (contracted) and J outer width of the base product, R LoRA rank, Q basis
size.
"""

# mypy: ignore-errors

from typing import Literal, NamedTuple

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


class Tile(NamedTuple):
    """Hold the block sizes of one program and its scheduling."""

    t: int
    j: int
    i: int
    num_warps: int
    num_stages: int


def tile_for(part: Part, itemsize: int, tma: bool, dropout: bool) -> Tile:
    """Return the tile of a part by its shared memory, for elements of `itemsize` bytes.

    Eight others were no better on Hopper (`benchmarks/NOTES.md`); elsewhere nothing was measured.
    The bytes of one stage are `(t + j) · i · itemsize`; with a result tile of
    `t · j · itemsize` more for the TMA store they must stay within the part's limit.
    Ordinary loads of a wide tile, and a mask of one, take more registers than there are.
    """
    if itemsize == 4:  # float32 products without matrix instructions: registers are the limit
        return Tile(64, 64, 16, 4, 2)
    if part.shared_memory >= 227 << 10 and tma:
        return Tile(128, 128, 64, 8, 4) if dropout else Tile(128, 256, 64, 8, 3)
    if part.tma and not tma:
        return Tile(128, 64, 32, 8, 3)
    if part.shared_memory >= 163 << 10:
        return Tile(128, 128, 32, 8, 4)
    if part.shared_memory >= 99 << 10:
        return Tile(128, 128, 32, 8, 3)
    return Tile(128, 128, 32, 8, 2)


@triton.jit
def _add_skinny(
    acc, left, right, t, j, T, J, R, stride_rr, stride_rj,
    BLOCK_R: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Return `acc + leftᵀ right` for `left[R, T]`, `right[R, J]` at rows `t` and columns `j`."""
    for start in tl.range(0, R, BLOCK_R, num_stages=1):
        r = start + tl.arange(0, BLOCK_R)
        a = tl.load(
            left + r[None, :].to(tl.int64) * T + t[:, None],
            mask=(r[None, :] < R) & (t[:, None] < T),
            other=0.0,
        )
        b = tl.load(
            right + r[:, None] * stride_rr + j[None, :] * stride_rj,
            mask=(r[:, None] < R) & (j[None, :] < J),
            other=0.0,
        )
        acc = dot(a, b, acc, TF32)
    return acc


@triton.jit(do_not_specialize=["T"])
def _extended_gemm_kernel(
    a, b, c, bias, left, right, d, cw, seed,
    T, I, J, R, Q, scaling, threshold, inverse_keep, programs,
    stride_at, stride_ai, stride_bi, stride_bj, stride_ct, stride_cj,
    stride_rr, stride_rj, stride_wq, stride_wj,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, B_TRANSPOSED: tl.constexpr, EVEN_I: tl.constexpr, ALIGNED: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, ACCUMULATE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Compute `c[T, J] = a[T, I] b[I, J] + bias + mask ⊙ (s leftᵀ right) + dᵀ cw`.

    `left[R, T]`, `right[R, J]`, `d[Q, T]`, `cw[Q, J]`. With TMA, `a`, `b`, `c` are descriptors (`b`
    of `[J, I]` if B_TRANSPOSED). ACCUMULATE adds to `c` instead, with no base product.
    """
    if ALIGNED:  # T is not specialised: this permits the compiler to vectorise
        T = T // 16 * 16
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles_j = tl.cdiv(J, BLOCK_J)
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_j, programs):
        # Groups of GROUP rows of tiles: the programs that run at once share rows of a and b in L2.
        group = tile // (GROUP * tiles_j)
        first = group * GROUP
        height = min(tiles_t - first, GROUP)
        t0 = (first + tile % (GROUP * tiles_j) % height) * BLOCK_T
        j0 = tile % (GROUP * tiles_j) // height * BLOCK_J
        t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
        j = j0 + tl.arange(0, BLOCK_J).to(tl.int64)

        acc = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
        acc = _add_skinny(acc, left, right, t, j, T, J, R, stride_rr, stride_rj, BLOCK_R, TF32)
        acc *= scaling
        if DROPOUT:
            keep = kept(tl.load(seed), t, j0, tl.cdiv(J, 8), threshold, BLOCK_J)
            acc = tl.where(keep, acc * inverse_keep, 0.0)
        if BLOCK_Q > 0:
            acc = _add_skinny(acc, d, cw, t, j, T, J, Q, stride_wq, stride_wj, BLOCK_Q, TF32)

        if not ACCUMULATE:
            for i0 in range(0, I, BLOCK_I):
                if TMA:
                    x = a.load([t0, i0])
                    w = b.load([j0, i0]).T if B_TRANSPOSED else b.load([i0, j0])
                else:
                    i = i0 + tl.arange(0, BLOCK_I)
                    inside = (i < I) | EVEN_I
                    x = tl.load(
                        a + t[:, None] * stride_at + i[None, :] * stride_ai,
                        mask=(t[:, None] < T) & inside[None, :],
                        other=0.0,
                    )
                    w = tl.load(
                        b + i[:, None].to(tl.int64) * stride_bi + j[None, :] * stride_bj,
                        mask=inside[:, None] & (j[None, :] < J),
                        other=0.0,
                    )
                acc = dot(x, w, acc, TF32)
        if BIAS:
            acc += tl.load(bias + j, mask=j < J, other=0.0).to(tl.float32)[None, :]

        if TMA and not ACCUMULATE:
            c.store([t0, j0], rounded(acc, c.dtype))
        else:
            out = c + t[:, None] * stride_ct + j[None, :] * stride_cj
            inside_c = (t[:, None] < T) & (j[None, :] < J)
            if ACCUMULATE:
                acc += tl.load(out, mask=inside_c, other=0.0).to(tl.float32)
            tl.store(out, rounded(acc, c.dtype.element_ty), mask=inside_c)


def extended_gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    projection: tuple[Tensor, Tensor] | None = None,
    dropout: Dropout | None = None,
    accumulate: bool = False,
    tile: Tile | None = None,
    tma: bool = True,
) -> None:
    """Write `a[T, I] b[I, J] + bias + mask ⊙ (s leftᵀ right) + dᵀ cw` into `out[T, J]`.

    Args:
        left, right: `[R, T]` contiguous and `[R, J]`, the adapter's skinny product.
        projection: `d[Q, T]` contiguous and `cw[Q, J]`.
        accumulate: add all terms but the base product to `out`, and leave the base product out.
        tile, tma: a tile other than the table's, no copy engine; for tests.
    """
    T, J = out.shape
    I, R = a.shape[1], left.shape[0]
    part = part_of(out.device)
    transposed = b.stride(0) == 1 and b.stride(1) != 1
    stored = b.mT if transposed else b
    tma = tma and not accumulate and copies_in_bulk(part, a, stored, out)
    d, cw = (left, right) if projection is None else projection
    Q, masked = 0 if projection is None else d.shape[0], dropout is not None
    seed, threshold, keep = drawn(dropout)
    tile = tile or tile_for(part, out.element_size(), tma, masked)
    tiles = triton.cdiv(T, tile.t) * triton.cdiv(J, tile.j)
    launch(
        _extended_gemm_kernel,
        (min(part.multiprocessors, tiles),),
        out,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        a=TensorDescriptor.from_tensor(a, [tile.t, tile.i]) if tma else a,
        b=TensorDescriptor.from_tensor(stored, [tile.j, tile.i] if transposed else [tile.i, tile.j])
            if tma else b,
        c=TensorDescriptor.from_tensor(out, [tile.t, tile.j]) if tma else out,
        bias=bias, left=left, right=right, d=d, cw=cw,
        seed=seed, T=T, I=I, J=J, R=R, Q=Q, scaling=scaling, threshold=threshold, inverse_keep=keep,
        programs=min(part.multiprocessors, tiles),
        stride_at=a.stride(0), stride_ai=a.stride(1),
        stride_bi=b.stride(0), stride_bj=b.stride(1),
        stride_ct=out.stride(0), stride_cj=out.stride(1),
        stride_rr=right.stride(0), stride_rj=right.stride(1),
        stride_wq=cw.stride(0), stride_wj=cw.stride(1),
        BLOCK_T=tile.t, BLOCK_I=tile.i, BLOCK_J=tile.j, BLOCK_R=min(32, at_least_16(R)),
        BLOCK_Q=0 if projection is None else min(32, at_least_16(Q)), GROUP=8,
        TMA=tma, B_TRANSPOSED=transposed, EVEN_I=I % tile.i == 0, ALIGNED=T % 16 == 0,
        BIAS=bias is not None, DROPOUT=masked, ACCUMULATE=accumulate, TF32=not exact_float32(),
    )  # fmt: skip


Path = Literal["extended", "addmm"]

# Parts with the copy engine and less shared memory than a Hopper: predicted, not measured. Their
# products reach 95 to 98 % of the library's, so they win up to this inner width.
WIDEST_EXTENDED = 4096


def choose(part: Part, itemsize: int, inner: int) -> Path:
    """Return the path of a product by its inner width, not by T: no new length recompiles."""
    if itemsize == 4:  # no matrix instruction multiplies float32 exactly; the library's loops do
        return "addmm"
    if part.tma and (part.shared_memory >= 227 << 10 or inner <= WIDEST_EXTENDED):
        return "extended"
    return "addmm"


def product(
    a: Tensor,
    b: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    projection: tuple[Tensor, Tensor] | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Return `a b + bias + mask ⊙ (s leftᵀ right) + dᵀ C [T, J]`, see `extended_gemm`."""
    path = choose(part_of(a.device), a.element_size(), b.shape[0])
    extended = path == "extended"
    if extended:
        out = a.new_empty(a.shape[0], b.shape[1])
    else:
        out = a @ b if bias is None else torch.addmm(bias, a, b)
    if extended or dropout is not None:  # only the kernel regenerates a mask
        extended_gemm(
            a, b, out, left, right, bias=bias if extended else None, scaling=scaling,
            projection=projection, dropout=dropout, accumulate=not extended,
        )  # fmt: skip
    elif projection is None:
        out.addmm_(left.mT, right, alpha=scaling)
    else:  # one more pass over `out` costs more than two small copies
        assert scaling == 1.0
        skinny = torch.cat([left, projection[0]])
        out.addmm_(skinny.mT, torch.cat([right, projection[1]]))
    return out
