"""Device functions that all kernels share.

Triton's interpreter multiplies bfloat16 wrongly and cuts float32 off where bfloat16 ends; both are
mended here, and only where it runs.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from grasp_kernels.ops.gpu.launch import INTERPRETED


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr):
    """`acc + a b` in float32; Triton's interpreter multiplies bfloat16 wrongly, so it upcasts."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` to nearest in `dtype`; the interpreter would cut float32 off where bfloat16 ends."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
