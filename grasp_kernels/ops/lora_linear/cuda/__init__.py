"""The operator on the CUDA C++ kernels of `csrc`: the passes; the base products are Triton's.

library    the compiled operators, loaded when they are first needed
passes     what `fused` asks for, made of them
"""

from grasp_kernels.ops.lora_linear.cuda.backend import (
    DTYPES,
    backward,
    draw_seed,
    forward,
    kept,
    refuses,
    unsupported,
)

__all__ = ["DTYPES", "backward", "draw_seed", "forward", "kept", "refuses", "unsupported"]
