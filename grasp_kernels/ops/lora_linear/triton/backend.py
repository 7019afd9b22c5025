"""The operator on Triton kernels.

Shapes: T tokens, K in, R LoRA rank, Q basis size.
"""

from functools import partial

import torch
from torch import Tensor

from grasp_kernels.ops.gpu.launch import kernel_support
from grasp_kernels.ops.lora_linear.dropout import device_seed
from grasp_kernels.ops.lora_linear.operands import Operands
from grasp_kernels.ops.lora_linear.triton import fused, passes

unsupported = kernel_support
draw_seed = device_seed
forward = partial(fused.forward, passes)
backward = partial(fused.backward, passes)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuses(x: Tensor, op: Operands) -> str | None:
    """Say why a call cannot be computed, or None."""
    T, R = x.shape[0], op.lora_A.shape[0]
    Q = 0 if op.write_basis is None else op.write_basis.shape[1]
    if x.dtype not in DTYPES:
        return f"it computes float32, float16 and bfloat16 but x has {x.dtype}"
    if (R + Q) * T >= 1 << 31:  # offsets inside skinny matrices are 32 bits wide
        return f"it takes fewer than 2³¹ elements of [dS | D] but R + Q = {R + Q} and T = {T}"
    return None
