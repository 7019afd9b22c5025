"""The operator on few large library calls: cuBLAS or MKL does the work, safe everywhere.

    forward:  S = X̃ Aᵀ;  Y = X Wᵀ + bias;  Y += s S B°ᵀ
    backward: dS = s dY B̂                          B̂ = (I − V Vᵀ) B when residual, else B°
              dX = dY' W + dS A                    dY' = dY − (dY V) Vᵀ when residual, else dY
              dA = dSᵀ X̃;  dB = s dYᵀ S, projected afterwards, small and in float32
    for many tokens, without dY':
              [dS | D] = dY [s B̂ | V];  dX = dY W;  dX += [dS | D] [A ; −C]      C = Vᵀ W
    with the base product of another library:
              Y = base + s S B°ᵀ;  dX = dS A;  dbase = dY'

`dY'` costs a pass over `dY` and its memory, `C` a pass over `W`: the smaller of the two is taken.
`C` is never kept, since nothing tells of a weight that is written through `.data`. No other tensor
of size T×N or T×K exists besides `Y` and `dX`. Dropout works on blocks of rows, and so does an
adapter in a wider dtype (float32 over bfloat16, as in stock peft outside of autocast): a block is
cast while it is in the cache. The skinny results `S`, `dS`, `D` are computed and kept transposed,
`[R, T]`: slices of them stay contiguous, later products need no transposition, and the CPU
libraries are up to 3.5 times faster (one thread, bfloat16, T=512, N=4096, R+Q=20: 0.60 ms as
`Gᵀ dYᵀ`, 2.16 ms as `dY G`).
Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels import cpu
from grasp_kernels.ops.lora_linear.dropout import blocks, masks
from grasp_kernels.ops.lora_linear.dropout import host_seed as draw_seed
from grasp_kernels.ops.lora_linear.operands import Gradients, Needs, Operands, Saved
from grasp_kernels.ops.lora_linear.reference import DTYPES, closed_factors, refuses, unsupported
from grasp_kernels.ops.projection import project_columns

__all__ = ["DTYPES", "backward", "draw_seed", "forward", "refuses", "unsupported"]


def write_weight(weight: Tensor, basis: Tensor) -> Tensor:
    """Return `C = Vᵀ W [Q, K]` in the dtype of `W[N, K]`, for `V[N, Q]`."""
    return basis.to(weight.dtype).mT @ weight


def forward(x: Tensor, op: Operands, base: Tensor | None = None) -> tuple[Tensor, Saved]:
    """Return `Y[T, N]` from `X[T, K]`; without a weight also from `base[T, N]`."""
    if not _multiplies(x):
        wide, wide_base = _wide(op), None if base is None else base.float()
        y, saved = forward(x.float(), wide, wide_base)
        return y.to(x.dtype), Saved(*(part.to(op.adapter_dtype(x)) for part in saved))
    A, B, b = closed_factors(op, op.adapter_dtype(x))
    S = _down(x, A, op)
    if op.weight is None:
        return added(base, S, B, b, op), Saved(S, A, B)
    y = F.linear(x, op.weight, whole_bias(op, b))
    return _add_(y, S, B.mT, op.scaling), Saved(S, A, B)


def backward(dy: Tensor, x: Tensor, saved: Saved, op: Operands, needs: Needs) -> Gradients:
    """Return the needed gradients from `dY[T, N]`."""
    if not _multiplies(dy):
        found = backward(dy.float(), x.float(), Saved(*map(Tensor.float, saved)), _wide(op), needs)
        return Gradients(*map(_in_dtype, found, (x, *op[:5], dy)))
    dy = dy if _is_blas_layout(dy) else dy.contiguous()
    dx = dA = dB = dbase = None
    if needs.x or needs.lora_A or op.projects(needs):
        dx, dbase, skinny, right = _through_base(dy, saved, op, needs)
        dx, dA = _through_adapter(dx, skinny, right, x, saved.A, op, needs)
    if needs.lora_B:
        # A dY' in float32 makes dB as exact as a projection afterwards does, in two launches less.
        if dbase is not None and dbase.dtype in (torch.float32, torch.float64):
            dB = _outer(dbase, saved.S, op.scaling)
        else:
            dB = project_columns(_outer(dy, saved.S, op.scaling), op.write_basis)
        dB = dB.to(op.lora_B.dtype, memory_format=torch.contiguous_format).contiguous()
    dW, dbias, db = base_gradients(dy, x, op, needs)
    return Gradients(dx, dW, dbias, dA, dB, db, dbase if needs.base else None)


def added(base: Tensor | None, S: Tensor, B: Tensor, b: Tensor | None, op: Operands) -> Tensor:
    """Return `base + s (Sᵀ B°ᵀ + b°) [T, N]` in new memory, for `S[R, T]`.

    The memory of `base[T, N]` belongs to its layer: the layer may need the values, and `base` may
    be a view.
    """
    assert base is not None
    start = base if b is None else (base + op.scaling * b).to(base.dtype)
    return _plus(start, S, B.mT, op.scaling)


def base_gradients(
    dy: Tensor, x: Tensor, op: Operands, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return `dW[N, K]`, `dbias[N]` and `db[N]`; few fine-tunes need them."""
    V = op.write_basis if op.residual else None
    dW = dbias = db = None
    if needs.weight and op.weight is not None:
        dW = project_columns(dy.mT @ x, V).to(op.weight.dtype)
    if needs.bias or needs.lora_bias:
        total = dy.sum(0, dtype=op.adapter_dtype(dy))
        dbias = project_columns(total, V).to(dy.dtype) if needs.bias else None
        if needs.lora_bias and op.lora_bias is not None:
            db = project_columns(op.scaling * total, op.write_basis).to(op.lora_bias.dtype)
    return dW, dbias, db


def whole_bias(op: Operands, b: Tensor | None) -> Tensor | None:
    """Return `bias + s b°`, the constant in every row of `Y`; None if there is neither."""
    if b is None:
        return op.bias
    assert op.weight is not None
    whole = op.scaling * b if op.bias is None else op.bias + op.scaling * b
    return whole.to(op.weight.dtype)


def _through_base(
    dy: Tensor, saved: Saved, op: Operands, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Return `dX[T, K]` of the base product, `dY'[T, N]`, and `L[E, T]`, `M[E, K]` of `dX += Lᵀ M`.

    The first R rows of `L` are `dSᵀ`. `dX` and `dY'` are None where they are not needed.
    """
    A, W, V = saved.A, op.weight, op.write_basis if op.residual else None
    left = (saved.B if op.closed else project_columns(saved.B, V)).mT.to(A.dtype)
    if V is None or not op.projects(needs):
        dx = dy @ W if needs.x and W is not None else None
        return dx, None, _across(left, dy, op.scaling), A
    Vt = V.mT.to(A.dtype)
    # Compiled code has no choice: each length on the other side would be compiled again.
    if W is None or torch.compiler.is_compiling() or 2 * dy.shape[0] < W.shape[1]:
        dS, D = _across(left, dy, op.scaling), _across(Vt, dy)
        projected = _plus(dy, D, Vt, -1.0)
        return None if W is None else projected @ W, projected, dS, A
    both = _across(torch.cat([op.scaling * left, Vt]), dy)
    return dy @ W, None, both, torch.cat([A, -write_weight(W, V).to(A.dtype)])


def _multiplies(x: Tensor) -> bool:
    """Say whether to multiply in the dtype of `x`; float16 must overflow for a GradScaler."""
    return x.dtype != torch.bfloat16 or x.device.type != "cpu" or cpu.multiplies(x.dtype)


def _wide(op: Operands) -> Operands:
    """Return the operands in float32, for a CPU without instructions for their dtype."""
    halves: dict[str, Any] = {
        name: value.float()
        for name, value in op._asdict().items()
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    }
    return op._replace(**halves)


def _in_dtype(found: Tensor | None, like: Tensor | None) -> Tensor | None:
    return found if found is None or like is None else found.to(like.dtype)


def _across(left: Tensor, x: Tensor, scaling: float = 1.0) -> Tensor:
    """Return `s L Xᵀ [R, T]` in the dtype of `L[R, K]`, for `X[T, K]`."""
    if left.dtype == x.dtype:
        return _scaled(scaling, left, x.mT)
    found = left.new_empty(left.shape[0], x.shape[0])
    for block in blocks(x):
        found[:, block] = left @ x[block].to(left.dtype).mT
    return found if scaling == 1.0 else found.mul_(scaling)


def _along(S: Tensor, x: Tensor, scaling: float = 1.0) -> Tensor:
    """Return `s S X [R, K]` in the dtype of `S[R, T]`, for `X[T, K]`."""
    if S.dtype == x.dtype:
        return _scaled(scaling, S, x)
    found = S.new_zeros(S.shape[0], x.shape[1])
    for block in blocks(x):
        found.addmm_(S[:, block], x[block].to(S.dtype), alpha=scaling)
    return found


def _add_(y: Tensor, S: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """Compute `Y += s Sᵀ R` in place, for `S[R, T]` and `R[R, N]`, rounded once."""
    if S.dtype == y.dtype:
        return y.addmm_(S.mT, right, alpha=scaling)
    for block in blocks(y):
        y[block].add_(S[:, block].mT @ right, alpha=scaling)
    return y


def _plus(y: Tensor, S: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Return `Y + s Sᵀ R` in new memory, for `S[R, T]` and `R[R, N]`."""
    if S.dtype == y.dtype:
        return torch.addmm(y, S.mT, right, alpha=scaling)
    return _add_(y.clone(), S, right, scaling)


def _outer(dy: Tensor, S: Tensor, scaling: float) -> Tensor:
    """Return `s dYᵀ Sᵀ [N, R]` in the dtype of `S[R, T]`, for `dY[T, N]`."""
    if S.dtype == dy.dtype:
        return _scaled(scaling, dy.mT, S.mT)
    return _along(S, dy, scaling).mT


def _scaled(scaling: float, left: Tensor, right: Tensor) -> Tensor:
    """Return `s L R` in one launch: with a beta of 0 addmm does not read its first operand."""
    if scaling == 1.0 or torch.compiler.is_compiling():
        return left @ right if scaling == 1.0 else (left @ right) * scaling  # fused with others
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def _through_adapter(
    dx: Tensor | None,
    skinny: Tensor,
    right: Tensor,
    x: Tensor,
    A: Tensor,
    op: Operands,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:
    """Return `dX[T, K]` and `dA[R, K]`; see `_through_base` for the arguments."""
    R = A.shape[0]
    dS = skinny if skinny.shape[0] == R else skinny[:R]
    dA: Tensor | None
    if op.dropout_seed is not None:
        if needs.x and dx is None:
            dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        if dx is not None and len(right) > R:
            _add_(dx, skinny[R:], right[R:])
        dA = _through_dropout(dx, dS, x, A, op, needs)
    else:
        if dx is not None:
            _add_(dx, skinny, right)
        elif needs.x:
            dx = (dS.mT @ A).to(x.dtype)
        dA = _along(dS, x) if needs.lora_A else None
    return dx, None if dA is None else dA.to(op.lora_A.dtype)


def _through_dropout(
    dx: Tensor | None, dS: Tensor, x: Tensor, A: Tensor, op: Operands, needs: Needs
) -> Tensor | None:
    """Return `dA = dSᵀ X̃ [R, K]`, and add `mask ⊙ dS A` to `dX`, with one mask for both."""
    assert op.dropout_seed is not None
    dA = None
    if needs.lora_A:
        dA = torch.zeros_like(A, dtype=torch.promote_types(A.dtype, torch.float32))
    for block, mask in masks(x, op.dropout_seed, op.dropout_p, A.dtype):
        dS_block = dS[:, block]
        if dx is not None and dx.dtype == A.dtype:
            dx[block].addcmul_(dS_block.mT @ A, mask)
        elif dx is not None:
            dx[block].add_((dS_block.mT @ A).mul_(mask))
        if dA is not None:
            dA += dS_block @ mask.mul_(x[block])
    return dA


def _down(x: Tensor, A: Tensor, op: Operands) -> Tensor:
    """Return `S = A X̃ᵀ [R, T]`."""
    if op.dropout_seed is None:
        return _across(A, x)
    S = A.new_empty(A.shape[0], x.shape[0])
    for block, mask in masks(x, op.dropout_seed, op.dropout_p, A.dtype):
        S[:, block] = A @ mask.mul_(x[block]).mT
    return S


def _is_blas_layout(matrix: Tensor) -> bool:
    """Say whether BLAS can read `matrix[T, N]` in place: unit stride one way, no overlap."""
    row, column = matrix.stride()
    T, N = matrix.shape
    return (column == 1 and row >= max(1, N)) or (row == 1 and column >= max(1, T))
