"""The dropout mask of the kernels, regenerated from a seed wherever it is needed.

Shapes: T tokens, K in.
"""

# mypy: ignore-errors

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Dropout(NamedTuple):
    """Hold the seed, int64 [1] on the device, and the probability of zero."""

    seed: Tensor
    p: float

    @property
    def threshold(self) -> int:
        """Return `p` in units of 2⁻¹⁶; a `p` of 1 keeps nothing."""
        return round(self.p * (1 << 16))

    @property
    def inverse_keep(self) -> float:
        """Return the factor of the kept elements, applied in float32 after the products."""
        return 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0


def drawn(dropout: Dropout | None) -> tuple[Tensor | None, int, float]:
    """Return the seed, the threshold and the factor of the kept elements."""
    if dropout is None:
        return None, 0, 1.0
    return dropout.seed, dropout.threshold, dropout.inverse_keep


@triton.jit
def kept(seed, rows, first, chunks, threshold, BLOCK: tl.constexpr):
    """Return the mask `[BT, BLOCK]` of `rows[BT]` (int64) and columns from `first`, 8 | first.

    Philox-4x32-10 (Salmon et al., SC 2011) at counter `row · chunks + column / 8`, where `chunks`
    is `⌈K / 8⌉`, gives eight 16-bit numbers for eight neighbouring columns; numbers at or above
    `threshold = p · 2¹⁶` are kept. One number an element from 32 bits would cost four times the
    arithmetic (predicted: 90 against 23 µs for 8192 × 4096 elements on an H100 with whole words,
    12 µs with halves), more than the pass over `X` around it.
    """
    chunk = first // 8 + tl.arange(0, BLOCK // 8)
    counter = rows[:, None] * chunks + chunk[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    halves = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    return tl.reshape(halves, (rows.shape[0], BLOCK)) >= threshold
