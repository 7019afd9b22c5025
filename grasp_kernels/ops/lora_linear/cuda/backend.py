"""The operator on CUDA C++ kernels.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from functools import partial

import torch
from torch import Tensor

from grasp_kernels.ops.lora_linear.cuda import library, passes
from grasp_kernels.ops.lora_linear.dropout import device_seed
from grasp_kernels.ops.lora_linear.operands import Operands
from grasp_kernels.ops.lora_linear.triton import fused

draw_seed = device_seed
forward = partial(fused.forward, passes)
backward = partial(fused.backward, passes)
DTYPES = (torch.bfloat16, torch.float16)
_MOST = 160  # of R + Q; kMaxSkinny in csrc/kernels/shapes.h


def unsupported(where: torch.device) -> str | None:
    """Say why the kernels cannot run on a device, or None."""
    reason = library.why_not()
    if reason is not None:
        return reason
    if library.operators().emulated():  # the build of the tests
        return None if where.type == "cpu" else "its extension was built for a CPU"
    if where.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(where)
    if major < 8:
        return f"it needs compute capability 8.0 or newer and this GPU has {major}.{minor}"
    index = torch.cuda.current_device() if where.index is None else where.index
    if not library.operators().runs_on(index):
        return f"its extension was built without code for compute capability {major}.{minor}"
    return None


def refuses(x: Tensor, op: Operands) -> str | None:
    """Say why a call cannot be computed, or None."""
    N, (R, K) = op.lora_B.shape[0], op.lora_A.shape
    Q = 0 if op.write_basis is None else op.write_basis.shape[1]
    if x.dtype not in DTYPES:
        return f"it computes float16 and bfloat16 but x has {x.dtype}"
    if N % 8 or K % 8:
        return f"it takes widths that are multiples of 8 but the layer has {(N, K)}"
    if R + Q > _MOST:
        return f"it takes ranks and bases with a sum up to {_MOST} but this layer has {R + Q}"
    return None
