"""The operator on Triton kernels: few reads of the activations, no result touched twice.

backend        the functions of a backend
fused          forward and backward as three passes and base products
passes         these passes on the kernels below
dropout        the mask, from a seed
down           S = A X̃ᵀ
tokens         [dS | D] = dY [s B̂ | V] and dB = s dYᵀ S from one read;  dA = dSᵀ X̃
reduce         sums of parts in a fixed order, (I − V Vᵀ) dB
gemm           Y and dX: the base product with R + Q more columns
"""
