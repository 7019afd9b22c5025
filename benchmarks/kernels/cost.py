"""What a case must cost: operations, bytes, and the floor that every provider is held against.

    floor = operations of the frozen products / peak rate + extra bytes / bandwidth
    extra bytes: forward X once; backward dY once and X once

The two terms are added, not overlapped: nothing that computes the adapter in passes of its own gets
below them. Operations of a provider count what its method needs, not what it does: a second `dY B`
or a recomputed layer is no work.
Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.kernels.shapes import Decoder, Linear


class Parts(NamedTuple):
    """A quantity of the forward and of the backward."""

    forward: float
    backward: float

    def as_row(self) -> dict[str, float]:
        """With the sum, as it stands in a row."""
        return {**self._asdict(), "both": self.forward + self.backward}


class Rates(NamedTuple):
    """Measured on the device at the start of a run."""

    peak_tflops: float  # 10¹² operations a second of one large matrix product
    bandwidth_gbs: float  # 10⁹ bytes a second, read and written, of one large copy


def frozen_flops(linear: Linear, T: int) -> Parts:
    """`X Wᵀ` and `dY W`; a frozen weight has no gradient."""
    product = 2.0 * T * linear.K * linear.N
    return Parts(product, product)


def adapter_flops(linear: Linear, T: int, R: int) -> Parts:
    """`X Aᵀ`, `S Bᵀ`; `dY B`, `dS A`, `dSᵀ X`, `dYᵀ S`."""
    product = 2.0 * T * R * (linear.K + linear.N)
    return Parts(product, 2 * product)


def projection_flops(linear: Linear, T: int, Q: int) -> Parts:
    """`dY V` and `D C` of a writer; nothing for a reader."""
    return Parts(0.0, 2.0 * T * Q * (linear.K + linear.N) if linear.writes else 0.0)


def extra_bytes(linear: Linear, T: int, bytes_per_value: int) -> Parts:
    """What the adapter must read beside the frozen products."""
    return Parts(
        float(bytes_per_value * T * linear.K), float(bytes_per_value * T * (linear.K + linear.N))
    )


def head_flops(decoder: Decoder, T: int) -> Parts:
    """The product with the vocabulary and its gradient."""
    product = 2.0 * T * decoder.hidden * decoder.vocabulary
    return Parts(product, product)


def total(parts: Iterable[Parts], times: int = 1) -> Parts:
    """Their sum, `times` over."""
    listed = list(parts)
    return Parts(times * sum(p.forward for p in listed), times * sum(p.backward for p in listed))


def floor_ms(products: Parts, extra: Parts, rates: Rates) -> Parts:
    """Milliseconds that operations and bytes take at the measured rates."""
    return Parts(
        *(
            1e3 * (flops / (rates.peak_tflops * 1e12) + moved / (rates.bandwidth_gbs * 1e9))
            for flops, moved in zip(products, extra, strict=True)
        )
    )


def needed_flops(
    linears: Iterable[Linear], T: int, R: int, Q: int, *, adapts: bool, projects: bool
) -> Parts:
    """Operations that the method of one provider needs for some linears."""
    listed = list(linears)
    parts = [frozen_flops(linear, T) for linear in listed]
    if adapts:
        parts += [adapter_flops(linear, T, R) for linear in listed]
    if projects:
        parts += [projection_flops(linear, T, Q) for linear in listed]
    return total(parts)
