"""The three passes of `fused.Passes` on Triton kernels.

Shapes: T tokens, C columns read by a pass, R LoRA rank, Q basis size, E skinny rows.
"""

from torch import Tensor

from grasp_kernels.ops.lora_linear.triton.down import down as down_pass
from grasp_kernels.ops.lora_linear.triton.dropout import Dropout
from grasp_kernels.ops.lora_linear.triton.reduce import finish_factor, finish_skinny, total
from grasp_kernels.ops.lora_linear.triton.tokens import one_read, token_pass

__all__ = ["down", "one_read", "sums"]


def down(
    x: Tensor,
    A: Tensor,
    *,
    scaling: float = 1.0,
    n_scaled: int | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    return down_pass(x, A, scaling=scaling, n_scaled=n_scaled, dropout=dropout)


def sums(
    z: Tensor,
    left: Tensor,
    out: Tensor,
    *,
    factor: Tensor | None = None,
    basis: Tensor | None = None,
    project: bool = False,
    scaling: float = 1.0,
    dropout: Dropout | None = None,
) -> Tensor | None:
    partial = token_pass(z, left, factor=factor, basis=basis, project=project, dropout=dropout)
    skinny = None
    if partial.skinny is not None:
        skinny = finish_skinny(partial.skinny, left.shape[0], scaling, z.dtype)
    keep = 1.0 if dropout is None else dropout.inverse_keep
    share = None if partial.shares is None else total(partial.shares)
    finish_factor(partial.sums, share, basis, scaling * keep, out)
    return skinny
