"""The SPECIFICATION of the operator, in plain PyTorch, equation by equation.

    X̃  = dropout(X)
    B° = (I − V Vᵀ) B,  b° = (I − V Vᵀ) b                         if closed, else B, b
    Y  = X Wᵀ + bias + s ((X̃ Aᵀ) B°ᵀ + b°)
    dY'= dY (I − V Vᵀ)                                            if residual, else dY
    dX = dY' W + dropout'(s dY' B° A)
    dA = (s dY' B°)ᵀ X̃
    dB = (I − V Vᵀ) s dY'ᵀ (X̃ Aᵀ)
    db = (I − V Vᵀ) s Σ dY',   dW = dY'ᵀ X,   dbias = Σ dY'

Another library may have computed `base[T, N]`, which then replaces `X Wᵀ + bias`. The gradient of
`base` is `dbase = dY'`, and `dY' W` is left to that library.

Every other backend is tested against this file. The projections of B and its gradient are computed
in at least float32, everything else in the dtype of the activations.
Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

import torch
from torch import Tensor

from grasp_kernels.ops.lora_linear.dropout import dropout
from grasp_kernels.ops.lora_linear.dropout import host_seed as draw_seed
from grasp_kernels.ops.lora_linear.operands import Gradients, Needs, Operands, Saved
from grasp_kernels.ops.projection import project_columns, project_rows

__all__ = ["DTYPES", "backward", "draw_seed", "forward", "refuses", "unsupported"]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def unsupported(where: torch.device) -> str | None:
    """Return None: operations of torch run everywhere."""
    return None


def refuses(x: Tensor, op: Operands) -> str | None:
    """Return None: every call is computed."""
    return None


def closed_factors(op: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return `A[R, K]`, `B°[N, R]`, `b°[N]`, projected in float32 and then rounded to `dtype`.

    Factors that need neither are the adapter's own tensors.
    """
    A, B, b = op.lora_A, op.lora_B, op.lora_bias
    if op.closed:
        B = project_columns(B, op.write_basis)
        b = None if b is None else project_columns(b, op.write_basis)
    return A.to(dtype), B.to(dtype), None if b is None else b.to(dtype)


def forward(x: Tensor, op: Operands, base: Tensor | None = None) -> tuple[Tensor, Saved]:
    """Return `Y[T, N]` from `X[T, K]`; without a weight also from `base[T, N]`."""
    dtype = op.adapter_dtype(x)
    A, B, b = closed_factors(op, dtype)
    S = A @ dropout(x.to(dtype), op.dropout_seed, op.dropout_p, x).mT
    if base is None:
        assert op.weight is not None
        base = x @ op.weight.mT
    y = base + op.scaling * (S.mT @ B.mT)
    if op.bias is not None:
        y = y + op.bias
    if b is not None:
        y = y + op.scaling * b
    return y.to(x.dtype), Saved(S, A, B)


def backward(dy: Tensor, x: Tensor, saved: Saved, op: Operands, needs: Needs) -> Gradients:
    """Return the needed gradients from `dY[T, N]`."""
    S, A, B = saved
    if op.residual:
        dy = project_rows(dy, op.write_basis)
    wide, dy = dy.to(A.dtype), dy.to(x.dtype)
    dS = op.scaling * (wide @ B)

    dx = dropout(dS @ A, op.dropout_seed, op.dropout_p, x) if needs.x else None
    if dx is not None:
        dx = (dx if op.weight is None else dy @ op.weight + dx).to(x.dtype)
    dW = dy.mT @ x if needs.weight else None
    dbias = dy.sum(0) if needs.bias else None
    dA = dB = db = None
    if needs.lora_A:
        x_dropped = dropout(x.to(A.dtype), op.dropout_seed, op.dropout_p, x)
        dA = (dS.mT @ x_dropped).to(op.lora_A.dtype)
    if needs.lora_B:
        dB = project_columns(op.scaling * (wide.mT @ S.mT), op.write_basis).to(op.lora_B.dtype)
    if needs.lora_bias and op.lora_bias is not None:
        db = project_columns(op.scaling * wide.sum(0), op.write_basis).to(op.lora_bias.dtype)
    return Gradients(dx, dW, dbias, dA, dB, db, dy if needs.base else None)
