"""The SPECIFICATION of the sketch: every entry of `Ω` is a function of its indices and a seed.

    (w₀, w₁, w₂, w₃) = Philox-4x32-10 of counter (g, n, b, 0) under key (seed mod 2³², seed / 2³²)
    Ω[b, n, 4g + 0] = ρ(w₀) cos θ(w₁),   Ω[b, n, 4g + 1] = ρ(w₀) sin θ(w₁)
    Ω[b, n, 4g + 2] = ρ(w₂) cos θ(w₃),   Ω[b, n, 4g + 3] = ρ(w₂) sin θ(w₃)
    ρ(w) = √(−2 ln((w mod 2³¹) 2⁻³¹ + 2⁻³²)),   θ(w) = π 2⁻³¹ w, with w read as a signed number

in float32 (Box and Muller 1958), then rounded to the dtype of the matrix. Philox is the generator
of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
Ω is made, used and dropped block by block.
Shapes: `B` batch members, `M` rows, `N` columns, `L` columns of the sketch, `G = ⌈L / 4⌉`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # what a round adds to the key
_ROUNDS = 10
_MASK = 0xFFFFFFFF

# Counters in a block of Ω: its three buffers of 16 bytes a counter stay in the caches of two cores,
# and each operation is long enough for both (N=14336, L=24, two cores: 2.2 ms; with a quarter of
# the block 3.7 ms; torch.randn takes 1.2 ms on one core).
_BLOCK = 3 << 14


def unsupported(where: torch.device) -> str | None:
    """The specification runs everywhere."""
    return None


def sketch(matrix: Tensor, size: int, seed: int | Tensor) -> Tensor:
    """`A Ω`, `[B, M, L]` from `A[B, M, N]`; differentiable in `A`."""
    B, M, N = matrix.shape
    work = torch.promote_types(matrix.dtype, torch.float32)
    if B == 0 or N == 0:
        return torch.zeros(B, M, size, dtype=work, device=matrix.device)
    keys = round_keys(seed, matrix.device)
    columns = max(1, _BLOCK // -(-size // 4))  # of A, in one block
    members = max(1, columns // N)

    def product(batch: range, rows: range) -> Tensor:
        test = gaussian(keys, batch, rows, size).to(matrix.dtype).to(work)
        return matrix[batch.start : batch.stop, :, rows.start : rows.stop].to(work) @ test

    sums = [
        reduce(torch.add, (product(batch, rows) for rows in _blocks(N, columns)))
        for batch in _blocks(B, members)
    ]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _blocks(total: int, length: int) -> Iterator[range]:
    return (range(start, min(start + length, total)) for start in range(0, total, length))


def gaussian(keys: Tensor, batch: range, rows: range, size: int) -> Tensor:
    """`Ω[batch, rows, :L]`, float32, stored with neighbouring rows next to each other."""
    groups = -(-size // 4)
    device = keys.device
    b = torch.arange(batch.start, batch.stop, device=device).view(-1, 1, 1)
    g = torch.arange(groups, device=device).view(1, -1, 1)
    n = torch.arange(rows.start, rows.stop, device=device)
    even, odd = philox((g, n, b, torch.zeros_like(g)), keys)
    omega = torch.empty(len(batch), groups, 2, 2, len(rows), device=device)
    cosines, sines = omega.permute(3, 2, 0, 1, 4)
    radius = (even.int() & 0x7FFFFFFF).float().mul_(2.0**-31).add_(2.0**-32)
    radius.log_().mul_(-2.0).sqrt_()
    angle = odd.int().float().mul_(math.pi * 2.0**-31)
    torch.mul(radius, angle.cos(), out=cosines)
    torch.mul(radius, angle.sin_(), out=sines)
    return omega.view(len(batch), 4 * groups, len(rows)).mT[..., :size]


def philox(counter: tuple[Tensor, ...], keys: Tensor) -> tuple[Tensor, Tensor]:
    """Philox-4x32-10: words `(w₀, w₂)` and `(w₁, w₃)`, each int64 `[2, ...]`.

    Of the latter the low 32 bits count. A round multiplies `c₀` and `c₂`, which are held in one
    buffer, and swaps their halves with those of `c₁` and `c₃`:

        (c₀, c₁, c₂, c₃) ← (hi(m₁ c₂) ^ c₁ ^ k₀,  lo(m₁ c₂),  hi(m₀ c₀) ^ c₃ ^ k₁,  lo(m₀ c₀))

    The two stay where their product was, so odd rounds find them in the order `c₂, c₀`: six
    operations a round instead of ten (a block of few counters takes 0.19 ms instead of 0.28).

    Args:
        counter: four int64 tensors below 2³² that broadcast.
        keys: of `round_keys`.
    """
    shape, device = torch.broadcast_shapes(*(part.shape for part in counter)), keys.device
    buffers = torch.empty(3, 2, *shape, dtype=torch.int64, device=device)
    (multiplied, m), (added, a), (product, p) = ((buffer, buffer.unbind()) for buffer in buffers)
    for word, part in zip((m[0], a[0], m[1], a[1]), counter, strict=True):
        word.copy_(part)
    order = torch.arange(2, device=device).view(2, *(1 for _ in shape))
    first, second = _MULTIPLIERS
    factors = first + (second - first) * order, second + (first - second) * order
    # As tensors: torch takes 1.5 µs longer over a Python number.
    half, mask = torch.full((), 32, device=device), torch.full((), _MASK, device=device)
    for i, key in enumerate(keys.view(_ROUNDS, *order.shape).unbind()):
        torch.mul(multiplied, factors[i % 2], out=product)
        torch.bitwise_right_shift(product, half, out=multiplied)
        m[0].bitwise_xor_(a[1])
        m[1].bitwise_xor_(a[0])
        multiplied.bitwise_xor_(key).bitwise_and_(mask)
        (added, a), (product, p) = (product, p), (added, a)
    return multiplied, added


def round_keys(seed: int | Tensor, where: torch.device) -> Tensor:
    """The keys of all rounds, int64 `[10, 2]`, in the order in which `philox` meets its words."""
    if isinstance(seed, int):
        seed = torch.full((1,), seed, device=where)
    rounds = torch.arange(_ROUNDS, device=where).view(-1, 1)
    word = (torch.arange(2, device=where) + rounds + 1) % 2
    first, second = _WEYL
    return (((seed >> 32 * word) & _MASK) + rounds * (first + (second - first) * word)) & _MASK
