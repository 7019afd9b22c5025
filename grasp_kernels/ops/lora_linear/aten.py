"""The operator on few large library calls: cuBLAS or MKL does the work, safe everywhere.

    forward:  S = X̃ A°ᵀ;  Y = X Wᵀ + bias;  Y += s S B°ᵀ
    backward: [dS | D] = dY [s B̂ | V]              B̂ = (I − V Vᵀ) B when residual, else B°
              dX = dY W;  dX += [dS | D] [A° ; −C]     C = Vᵀ W, the D C term when residual
              dA = dSᵀ X̃;  dB = s dYᵀ S;  both projected afterwards, small and in float32
    of a base product of another library:
              Y = base + s S B°ᵀ;  dX = dS A°;  dbase = dY − D Vᵀ

Nothing of size T×N or T×K exists beside `Y` and `dX`; dropout works on blocks of rows. The skinny
results `S`, `dS`, `D` are computed and kept transposed, `[R, T]`: slices of them stay contiguous,
the products that follow need no transposition, and the CPU libraries are up to 3.5 times faster
(one thread, bfloat16, T=512, N=4096, R+Q=20: 0.60 ms as `Gᵀ dYᵀ`, 2.16 ms as `dY G`).
Shapes: T tokens, K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels.ops.lora_linear.dropout import host_seed as draw_seed
from grasp_kernels.ops.lora_linear.dropout import kept, masks
from grasp_kernels.ops.lora_linear.operands import Gradients, Needs, Operands, Saved
from grasp_kernels.ops.lora_linear.reference import DTYPES, closed_factors
from grasp_kernels.ops.projection import project_columns, project_rows

__all__ = ["DTYPES", "backward", "draw_seed", "forward", "kept", "refuses", "unsupported"]


def unsupported(where: torch.device) -> str | None:
    """Library calls run everywhere."""
    return None


def refuses(x: Tensor, op: Operands) -> str | None:
    """Nothing."""
    return None


def write_weight(weight: Tensor, basis: Tensor) -> Tensor:
    """`C = Vᵀ W [Q, K]` in the dtype of `W[N, K]`, for `V[N, Q]`."""
    return basis.to(weight.dtype).mT @ weight


def forward(x: Tensor, op: Operands, base: Tensor | None = None) -> tuple[Tensor, Saved]:
    """`Y[T, N]` from `X[T, K]`; without a weight also from `base[T, N]`."""
    A, B, b = closed_factors(op, x.dtype)
    S = _down(x, A, op)
    if op.weight is None:
        return added(base, S, B, b, op), Saved(S, A, B)
    y = F.linear(x, op.weight, whole_bias(op, b))
    return y.addmm_(S.mT, B.mT, alpha=op.scaling), Saved(S, A, B)


def backward(dy: Tensor, x: Tensor, saved: Saved, op: Operands, needs: Needs) -> Gradients:
    """The gradients that are needed, from `dY[T, N]`."""
    dy = dy if _is_blas_layout(dy) else dy.contiguous()
    skinny = _skinny(dy, saved.B, op, needs)
    dx = dA = dB = dbase = None
    if skinny is not None:
        dx, dA = _through_adapter(dy, skinny, x, saved.A, op, needs)
        if needs.base and op.write_basis is not None:
            V = op.write_basis.to(dy.dtype)
            dbase = torch.addmm(dy, skinny[saved.A.shape[0] :].mT, V.mT, alpha=-1)
    if needs.lora_B:
        dB = project_columns(_scaled(op.scaling, saved.S, dy).mT, op.write_basis)
        dB = dB.to(op.lora_B.dtype, memory_format=torch.contiguous_format).contiguous()
    dW, dbias, db = base_gradients(dy, x, op, needs)
    return Gradients(dx, dW, dbias, dA, dB, db, dbase)


def added(base: Tensor | None, S: Tensor, B: Tensor, b: Tensor | None, op: Operands) -> Tensor:
    """`base + s (Sᵀ B°ᵀ + b°) [T, N]` in new memory, for `S[R, T]`.

    That of `base[T, N]` is its layer's, which may need it as it is, and it may be a view.
    """
    assert base is not None
    start = base if b is None else base + op.scaling * b
    return torch.addmm(start, S.mT, B.mT, alpha=op.scaling)


def base_gradients(
    dy: Tensor, x: Tensor, op: Operands, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`dW[N, K]`, `dbias[N]` and `db[N]`, which few fine-tunes ask for."""
    V = op.write_basis if op.residual else None
    dW = dbias = db = None
    if needs.weight and op.weight is not None:
        dW = project_columns(dy.mT @ x, V).to(op.weight.dtype)
    if needs.bias or needs.lora_bias:
        total = dy.sum(0)
        dbias = project_columns(total, V).to(dy.dtype) if needs.bias else None
        if needs.lora_bias and op.lora_bias is not None:
            db = project_columns(op.scaling * total, op.write_basis).to(op.lora_bias.dtype)
    return dW, dbias, db


def whole_bias(op: Operands, b: Tensor | None) -> Tensor | None:
    """`bias + s b°`, all that is added to every row of `Y`; None if there is neither."""
    if b is None:
        return op.bias
    return op.scaling * b if op.bias is None else op.bias + op.scaling * b


def _skinny(dy: Tensor, B: Tensor, op: Operands, needs: Needs) -> Tensor | None:
    """`[dS | D]ᵀ [R + Q, T]`, or `dSᵀ [R, T]` where D is not needed; None if neither is."""
    projects = op.projects(needs)
    if not (needs.x or needs.lora_A or projects):
        return None
    V = op.write_basis if op.residual else None
    left = (B if op.closed else project_columns(B, V)).mT.to(dy.dtype)
    if projects and V is not None:
        return torch.cat([op.scaling * left, V.mT.to(left.dtype)]) @ dy.mT
    return _scaled(op.scaling, left, dy.mT)


def _scaled(scaling: float, left: Tensor, right: Tensor) -> Tensor:
    """`s L R` in one launch: with a beta of 0 addmm does not read what it would add to."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def _through_adapter(
    dy: Tensor, skinny: Tensor, x: Tensor, A: Tensor, op: Operands, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """`dX[T, K]` and `dA[R, K]` from `[dS | D]ᵀ [R + Q, T]`."""
    R, right, dx = A.shape[0], A, None
    dS = skinny[:R]
    if needs.x and op.weight is not None:
        dx = dy @ op.weight
        if op.write_basis is not None and op.projects(needs):
            C = op.write_weight
            C = write_weight(op.weight, op.write_basis) if C is None else C
            right = torch.cat([A, -C.to(A.dtype)])

    dA: Tensor | None
    if op.dropout_seed is not None:
        if needs.x and dx is None:
            dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        if dx is not None and right.shape[0] > R:
            dx.addmm_(skinny[R:].mT, right[R:])
        dA = _through_dropout(dx, dS, x, A, op, needs)
    else:
        if dx is not None:
            dx.addmm_(skinny.mT, right)
        elif needs.x:
            dx = dS.mT @ A
        dA = dS @ x if needs.lora_A else None
    if dA is not None:
        dA = project_rows(dA, op.read_basis).to(op.lora_A.dtype)
    return dx, dA


def _through_dropout(
    dx: Tensor | None, dS: Tensor, x: Tensor, A: Tensor, op: Operands, needs: Needs
) -> Tensor | None:
    """`dA = dSᵀ X̃ [R, K]` from `dSᵀ[R, T]`, and `dX += mask ⊙ dS A°`, with one mask for both."""
    assert op.dropout_seed is not None
    dA = None
    if needs.lora_A:
        dA = torch.zeros_like(A, dtype=torch.promote_types(A.dtype, torch.float32))
    for block, mask in masks(x, op.dropout_seed, op.dropout_p):
        dS_block = dS[:, block]
        if dx is not None:
            dx[block].addcmul_(dS_block.mT @ A, mask)
        if dA is not None:
            dA += dS_block @ mask.mul_(x[block])
    return dA


def _down(x: Tensor, A: Tensor, op: Operands) -> Tensor:
    """`S = A° X̃ᵀ [R, T]`."""
    if op.dropout_seed is None:
        return A @ x.mT
    S = x.new_empty(A.shape[0], x.shape[0])
    for block, mask in masks(x, op.dropout_seed, op.dropout_p):
        S[:, block] = A @ mask.mul_(x[block]).mT
    return S


def _is_blas_layout(matrix: Tensor) -> bool:
    """Whether a BLAS call can read `matrix[T, N]` in place: unit stride one way, no overlap."""
    row, column = matrix.stride()
    T, N = matrix.shape
    return (column == 1 and row >= max(1, N)) or (row == 1 and column >= max(1, T))
