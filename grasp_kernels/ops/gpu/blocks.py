"""Device functions shared by all kernels.

Triton's interpreter multiplies bfloat16 wrongly, and truncates float32 to bfloat16. Both errors are
corrected here, and only under the interpreter.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from grasp_kernels.ops.gpu.launch import INTERPRETED


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr):
    """Return `acc + a b` in float32; the interpreter gets upcast operands, see above."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return `x` rounded to nearest in `dtype`; the interpreter would truncate it."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
