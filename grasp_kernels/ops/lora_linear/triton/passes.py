"""The three passes of `fused` on Triton kernels; the CUDA backend has the same functions.

`one_read` says whether `sums` with a factor costs less than `sums` and `down`, two reads of `z`.
Shapes: T tokens, C columns read by a pass, R LoRA rank, Q basis size, E skinny rows.
"""

from torch import Tensor

from grasp_kernels.ops.lora_linear.triton.down import down
from grasp_kernels.ops.lora_linear.triton.dropout import Dropout, drawn
from grasp_kernels.ops.lora_linear.triton.reduce import finish_factor, finish_skinny, total
from grasp_kernels.ops.lora_linear.triton.tokens import one_read, token_pass

__all__ = ["down", "one_read", "sums"]


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
    """Write `s (I − V Vᵀ) z̃ᵀ leftᵀ` into `out[C, R]`, for `z[T, C]` and `left[R, T]`.

    With `factor[C, R]` also return the skinny result of the same read, `[s factor | −basis]ᵀ zᵀ`,
    of E = R + Q rows with `project` and R without. `basis` is float32 `[C, Q]`, orthonormal.
    """
    partial = token_pass(z, left, factor=factor, basis=basis, project=project, dropout=dropout)
    skinny = None
    if partial.skinny is not None:
        skinny = finish_skinny(partial.skinny, left.shape[0], scaling, z.dtype)
    share = None if partial.shares is None else total(partial.shares)
    finish_factor(partial.sums, share, basis, scaling * drawn(dropout)[2], out)
    return skinny
