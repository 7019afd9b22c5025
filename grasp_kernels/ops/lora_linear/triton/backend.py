"""Forward and backward of the operator as sequences of kernel launches and base products.

Shapes: T tokens, K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels.ops.gpu.launch import kernel_support
from grasp_kernels.ops.lora_linear.aten import base_gradients, whole_bias, write_weight
from grasp_kernels.ops.lora_linear.operands import Gradients, Needs, Operands, Saved
from grasp_kernels.ops.lora_linear.reference import closed_factors
from grasp_kernels.ops.lora_linear.triton.base_product import carrier, carry, product
from grasp_kernels.ops.lora_linear.triton.down import down
from grasp_kernels.ops.lora_linear.triton.dropout import Dropout, keep_mask
from grasp_kernels.ops.lora_linear.triton.reduce import finish_factor, finish_skinny
from grasp_kernels.ops.lora_linear.triton.tokens import one_read, slab_in_force, token_pass
from grasp_kernels.ops.projection import project_columns

unsupported = kernel_support
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kept(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """The elements of `x[T, K]` that this backend's dropout keeps: bool `[T, K]`."""
    return keep_mask(x, Dropout(seed, p))


def forward(x: Tensor, op: Operands) -> tuple[Tensor, Saved]:
    """`Y[T, N]` from `X[T, K]`."""
    _check(x, op)
    A, B, b = closed_factors(op, x.dtype)
    bias, E, N = whole_bias(op, b), _spare(op), op.weight.shape[0]
    wide = carrier(x, N, E)
    S = down(x, A, dropout=_dropout(op), copy=wide)
    if wide is not None and op.padded_weight is not None:
        y = F.linear(carry(wide, S, E, op.scaling), op.padded_weight[:N], bias)
    else:
        y = product(x, op.weight.mT, S, B.mT, bias=bias, scaling=op.scaling)
    return y, Saved(S, A, B)


def backward(dy: Tensor, x: Tensor, saved: Saved, op: Operands, needs: Needs) -> Gradients:
    """The gradients that are needed, from `dY[T, N]`."""
    K, E = op.weight.shape[1], _spare(op)
    # A mask cannot ride along: it belongs to dS A° alone.
    wide = carrier(dy, K, E) if needs.x and op.dropout_seed is None else None
    skinny, dB = _gradient_pass(dy, saved, op, needs, wide)
    dx = dA = None
    if skinny is not None and needs.x:
        if wide is not None and op.padded_weight is not None:
            dx = carry(wide, skinny, E) @ op.padded_weight[:, :K]
        else:
            dx = _backward_product(dy, skinny, saved.A, op)
    if skinny is not None and needs.lora_A:
        dA = _input_pass(x, skinny[: saved.A.shape[0]], op)
    dW, dbias, db = base_gradients(dy, x, op, needs)
    return Gradients(dx, dW, dbias, dA, dB, db)


def _gradient_pass(
    dy: Tensor, saved: Saved, op: Operands, needs: Needs, copy: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """`[s dS | −D]ᵀ [E, T]` if `dX` or `dA` is needed, `dB[N, R]` if it is, and `copy` filled.

    `D` only if `dY` is projected on its way to `dX`. One read of `dY`, unless the parts of the
    skinny result would weigh more than a second one.
    """
    S, V, R = saved.S, op.write_basis, saved.S.shape[0]
    # dS must be that of the projected dY; a closed B is in the complement of V already.
    B = saved.B
    if op.residual and not op.closed:
        B = project_columns(B, V).to(B.dtype)
    through, projected = needs.x or needs.lora_A, op.residual and V is not None and needs.x
    Q = 0 if V is None else V.shape[1]
    E = R + (Q if projected else 0)
    skinny = dB = None
    together = through and needs.lora_B and one_read(slab_in_force(dy, R, Q, E), E)
    if through and not together:
        factors = [B.mT] if not projected or V is None else [B.mT, V.mT.to(B.dtype)]
        skinny = down(dy, torch.cat(factors), scaling=op.scaling, n_scaled=R, copy=copy)
    if needs.lora_B:
        factor, copy = (B, copy) if together else (None, None)
        partial = token_pass(
            dy, S, factor=factor, basis=V, project=together and projected, copy=copy
        )
        if partial.skinny is not None:
            skinny = finish_skinny(partial.skinny, R, op.scaling, dy.dtype)
        dB = op.lora_B.new_empty(op.lora_B.shape)
        finish_factor(partial.sums, partial.shares, V, op.scaling, dB)
    return skinny, dB


def _backward_product(dy: Tensor, skinny: Tensor, A: Tensor, op: Operands) -> Tensor:
    """`dX[T, K] = dY W + mask ⊙ (dS A°) − D C`."""
    R = A.shape[0]
    projection = None
    if skinny.shape[0] > R:
        C = op.write_weight
        if C is None:
            assert op.write_basis is not None
            C = write_weight(op.weight, op.write_basis)
        projection = skinny[R:], C
    return product(dy, op.weight, skinny[:R], A, projection=projection, dropout=_dropout(op))


def _input_pass(x: Tensor, dS: Tensor, op: Operands) -> Tensor:
    """`dA[R, K] = dSᵀ X̃ (I − U Uᵀ)`."""
    dropout = _dropout(op)
    partial = token_pass(x, dS, basis=op.read_basis, dropout=dropout)
    dA = op.lora_A.new_empty(op.lora_A.shape)
    scaling = 1.0 if dropout is None else dropout.inverse_keep
    finish_factor(partial.sums, partial.shares, op.read_basis, scaling, dA.mT)
    return dA


def _dropout(op: Operands) -> Dropout | None:
    return None if op.dropout_seed is None else Dropout(op.dropout_seed, op.dropout_p)


def _spare(op: Operands) -> int:
    """The spare columns and rows of a padded weight, 0 for an ordinary one."""
    return 0 if op.padded_weight is None else op.padded_weight.shape[0] - op.weight.shape[0]


def _check(x: Tensor, op: Operands) -> None:
    T, R, Q = (
        x.shape[0],
        op.lora_A.shape[0],
        0 if op.write_basis is None else op.write_basis.shape[1],
    )
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"backend 'triton' computes float32, float16 and bfloat16 but x has {x.dtype}; "
            "use backend='aten'."
        )
    if (R + Q) * T >= 1 << 31:  # offsets inside skinny matrices are 32 bits wide
        raise ValueError(
            f"backend 'triton' takes fewer than 2³¹ elements of [dS | D] but {T} tokens and "
            f"R + Q = {R + Q} have {(R + Q) * T}; split the batch or use backend='aten'."
        )
