"""The dropout mask as a function of a seed, so that nothing of its size is ever stored.

Backends on library calls draw this mask from torch's generator of the device; kernels have a
counter-based mask. The elements kept by a seed thus depend on the backend, as they depend on the
device everywhere in torch.

The seed comes from torch's own generators. Activation checkpointing restores the generators of the
host and of the device, so it draws the same seed again and recomputes the same mask.
Shapes: T tokens, K in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# The mask is drawn in blocks of this many elements: 1 Mi float32 stay inside a last-level cache,
# and the block size is part of the mask's definition, so forward and backward must agree on it.
BLOCK_ELEMENTS = 1 << 20


def host_seed(like: Tensor) -> Tensor:
    """Draw a seed, int64 [1], on the host for library calls.

    Reading a seed from a GPU would wait for all work queued there.
    """
    return torch.randint(0, 2**63 - 1, (1,), device="cpu")


def device_seed(like: Tensor) -> Tensor:
    """Draw a seed, int64 [1], on the device of `like` for kernels.

    This is an ordinary random operator of torch: every compiler pass knows not to merge or repeat
    it. An operator of our own was merged by common-subexpression elimination in spite of its tag.
    """
    return torch.randint(0, 2**63 - 1, (1,), device=like.device)


def blocks(x: Tensor) -> Iterator[slice]:
    """Yield blocks of the rows of `x[T, K]`; one block in compiled code, for any T."""
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    rows = max(1, BLOCK_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, x.shape[0], rows):
        yield slice(start, min(start + rows, x.shape[0]))


def masks(
    x: Tensor, seed: Tensor, p: float, dtype: torch.dtype | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows with their mask, `0` or `1 / (1 − p)`, in `dtype` or `x.dtype`."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    keep = 1.0 - p
    for block in blocks(x):
        mask = torch.empty_like(x[block], memory_format=torch.contiguous_format)
        mask = mask.bernoulli_(keep, generator=generator).to(dtype or x.dtype)
        yield block, mask.div_(keep) if keep > 0 else mask


def dropout(x: Tensor, seed: Tensor | None, p: float, like: Tensor | None = None) -> Tensor:
    """Return the whole `X̃[T, K]`, `X` without a seed; `like[T, K]` or `x` gives the mask."""
    if seed is None:
        return x
    dropped = torch.empty_like(x, memory_format=torch.contiguous_format)
    for block, mask in masks(x if like is None else like, seed, p, x.dtype):
        torch.mul(x[block], mask, out=dropped[block])
    return dropped
