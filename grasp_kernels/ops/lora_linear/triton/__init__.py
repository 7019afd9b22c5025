"""The operator on Triton kernels: few reads of the activations, no result touched twice.

    down      S = A° X̃ᵀ                                         one read of X
    gemm      Y = X Wᵀ + bias + s S° B°ᵀ                         the base product, R more columns
    tokens    [dS | D] = dY [s B̂ | V],  dB = s dYᵀ S             one read of dY
    tokens    dA = dSᵀ X̃                                        one read of X
    gemm      dX = dY W + mask ⊙ (dS A°) − D C                   the same, R + Q more columns
    reduce    sums of parts in a fixed order, (I − V Vᵀ) dB, dA (I − U Uᵀ)

Shapes: T tokens, K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from grasp_kernels.ops.lora_linear.triton.backend import backward, forward, kept, unsupported

__all__ = ["backward", "forward", "kept", "unsupported"]
