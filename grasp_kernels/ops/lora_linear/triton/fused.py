"""Forward and backward of the operator as three passes over the activations and base products.

    down      S = A X̃ᵀ                                          one read of X
    product   Y = X Wᵀ + bias + s S° B°ᵀ                         the base product, R more columns
    sums      [dS | D] = dY [s B̂ | V],  dB = (I − V Vᵀ) s dYᵀ S  one read of dY
    sums      dA = dSᵀ X̃                                        one read of X
    product   dX = dY W + mask ⊙ (dS A) − D C                    the same, R + Q more columns

Where another library computes the base product, its result comes in, `Y = base + s S B°ᵀ`, its
gradient goes out, `dbase = dY − D Vᵀ`, and the last product is `dX = mask ⊙ (dS A)`.

Each backend has its own passes, which `triton.passes` describes; the products are shared.
Shapes: T tokens, K in, N out, C columns read by a pass (K or N), R LoRA rank, Q basis size,
E rows of a skinny result.
"""

from typing import Any

import torch
from torch import Tensor

from grasp_kernels.ops.lora_linear.aten import added, base_gradients, whole_bias, write_weight
from grasp_kernels.ops.lora_linear.operands import Gradients, Needs, Operands, Saved
from grasp_kernels.ops.lora_linear.reference import closed_factors
from grasp_kernels.ops.lora_linear.triton.dropout import Dropout
from grasp_kernels.ops.lora_linear.triton.gemm import product
from grasp_kernels.ops.projection import project_columns

Passes = Any  # `triton.passes`, or a module with the same functions


def forward(
    passes: Passes, x: Tensor, op: Operands, base: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """Return `Y[T, N]` from `X[T, K]`; without a weight also from `base[T, N]`."""
    A, B, b = closed_factors(op, x.dtype)
    S = passes.down(x, A, dropout=_dropout(op))
    if op.weight is None:
        return added(base, S, B, b, op), Saved(S, A, B)
    y = product(x, op.weight.mT, S, B.mT, bias=whole_bias(op, b), scaling=op.scaling)
    return y, Saved(S, A, B)


def backward(
    passes: Passes, dy: Tensor, x: Tensor, saved: Saved, op: Operands, needs: Needs
) -> Gradients:
    """Return the needed gradients from `dY[T, N]`."""
    R = saved.A.shape[0]
    skinny, dB = _gradient_pass(dy, saved, op, needs, passes)
    dx = dA = dbase = None
    if skinny is not None and needs.x:
        dx = _backward_product(dy, skinny, saved.A, op)
    if skinny is not None and needs.lora_A:
        dA = op.lora_A.new_empty(op.lora_A.shape)
        passes.sums(x, skinny[:R], dA.mT, dropout=_dropout(op))
    if skinny is not None and needs.base and op.write_basis is not None:
        dbase = torch.addmm(dy, skinny[R:].mT, op.write_basis.to(dy.dtype).mT)
    dW, dbias, db = base_gradients(dy, x, op, needs)
    return Gradients(dx, dW, dbias, dA, dB, db, dbase)


def _gradient_pass(
    dy: Tensor, saved: Saved, op: Operands, needs: Needs, passes: Passes
) -> tuple[Tensor | None, Tensor | None]:
    """Return `[s dS | −D]ᵀ [E, T]` and `dB[N, R]`, each None where not needed.

    `D` is computed only if `dY` is projected on its way to `dX` or `dbase`. There is one read of
    `dY`, unless the parts of the skinny result would cost more than a second read.
    """
    S, V, R = saved.S, op.write_basis, saved.S.shape[0]
    # dS must be that of the projected dY; a closed B is in the complement of V already.
    B = saved.B
    if op.residual and not op.closed:
        B = project_columns(B, V).to(B.dtype)
    projected = op.projects(needs)
    through = needs.x or needs.lora_A or projected
    E = R + (V.shape[1] if projected and V is not None else 0)
    skinny = dB = None
    together = through and needs.lora_B and passes.one_read(dy, R, E)
    if through and not together:
        factors = [B.mT] if not projected or V is None else [B.mT, V.mT.to(B.dtype)]
        rows = torch.cat(factors)
        skinny = passes.down(dy, rows, scaling=op.scaling, n_scaled=R)
    if needs.lora_B:
        dB = op.lora_B.new_empty(op.lora_B.shape)
        factor, project = B if together else None, together and projected
        found = passes.sums(dy, S, dB, factor=factor, basis=V, project=project, scaling=op.scaling)
        skinny = found if together else skinny
    return skinny, dB


def _backward_product(dy: Tensor, skinny: Tensor, A: Tensor, op: Operands) -> Tensor:
    """Return `dX[T, K] = dY W + mask ⊙ (dS A) − D C`."""
    R = A.shape[0]
    if op.weight is None:  # a base product of inner width 0
        return product(dy[:, :0], A[:0], skinny[:R], A, dropout=_dropout(op))
    projection = None
    if skinny.shape[0] > R:
        assert op.write_basis is not None
        projection = skinny[R:], write_weight(op.weight, op.write_basis)
    return product(dy, op.weight, skinny[:R], A, projection=projection, dropout=_dropout(op))


def _dropout(op: Operands) -> Dropout | None:
    return None if op.dropout_seed is None else Dropout(op.dropout_seed, op.dropout_p)
