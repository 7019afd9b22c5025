"""Base weights with spare columns and rows, in which the adapter and the projection ride along.

    [X | sS] [W | B°]ᵀ           = X Wᵀ + s S B°ᵀ
    [dY | dS | −D] [W ; A° ; C]  = dY W + dS A° − D C

Each is one library product with E more reduction columns. The price is a copy of `X` (or `dY`)
into rows that are E columns longer, made by the pass that reads it anyway; it is less than reading
and writing the whole result where the inner width is below about twice the outer one. One buffer
serves both directions, so the weight is stored once:

    buffer [N + E, K + E]    W  | B° 0
                             A° |  0
                             C  |  0

Shapes: T tokens, K in, N out, R LoRA rank, Q write basis size, E spare columns and rows.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

_ALIGNED = 16  # elements: rows of two-byte elements stay where the copy engine can read them


class Padded(NamedTuple):
    """The parts of a padded weight, as views of its buffer."""

    weight: Tensor  # W [N, K]
    closed_A: Tensor  # A° [R, K]
    closed_B: Tensor  # B° [N, R]
    write_weight: Tensor  # C [Q, K]


def spare(R: int, Q: int) -> int:
    """The columns and rows E that an adapter of rank R and a basis of size Q need."""
    return -(-(R + Q) // _ALIGNED) * _ALIGNED


def pad(weight: Tensor, E: int) -> Tensor:
    """A buffer `[N + E, K + E]` that begins with `W[N, K]`; the rest is zero."""
    N, K = weight.shape
    buffer = weight.new_zeros(N + E, K + E)
    buffer[:N, :K].copy_(weight)
    return buffer


def parts(buffer: Tensor, N: int, K: int, R: int, Q: int) -> Padded:
    """Views of the parts; what is in the way of a smaller rank than before must be zeroed."""
    return Padded(
        buffer[:N, :K], buffer[N : N + R, :K], buffer[:N, K : K + R], buffer[N + R : N + R + Q, :K]
    )
