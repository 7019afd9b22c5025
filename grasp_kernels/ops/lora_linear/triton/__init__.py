"""The operator on Triton kernels: few reads of the activations, no result touched twice.

passes         what `fused` asks for, made of the kernels below
down           S = A X̃ᵀ
tokens         [dS | D] = dY [s B̂ | V] and dB = s dYᵀ S from one read;  dA = dSᵀ X̃
reduce         sums of parts in a fixed order, (I − V Vᵀ) dB
base_product   Y and dX: how the skinny columns join the base product
gemm           the base product with R + Q more columns
"""

from grasp_kernels.ops.lora_linear.triton.backend import (
    DTYPES,
    backward,
    draw_seed,
    forward,
    kept,
    refuses,
    unsupported,
)

__all__ = ["DTYPES", "backward", "draw_seed", "forward", "kept", "refuses", "unsupported"]
