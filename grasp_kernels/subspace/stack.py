"""LoRA weights as blocks in the coordinates of the residual stream, side by side.

The left singular vectors of the stack are the directions that many layers moved along. A sign-flip
null says how large its first singular value is by chance.

Shapes: `D` width of the stream, `R` LoRA rank, `K` inputs and `N` outputs of a linear layer, `C`
columns of all blocks together, `G` groups of blocks, `F` draws of the null.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_kernels.adapters import LoRAWeights

# Lanczos steps for the largest singular value of a draw. Noise blocks are the hardest case, since
# their spectrum has no gap: on 64 orthonormal blocks of rank 16 and width 4096 the mean draw is
# 1.481 after 12 steps, 1.490 after 40. The default randomized SVD gives less there (1.435), so a
# comparison of the two errs towards no direction.
_LANCZOS_STEPS = 12
# Draws that go through the recurrence together: more of them fall out of the cache.
_DRAWS_TOGETHER = 16


@dataclass(frozen=True)
class Group:
    """Rows that share their signs under the null: those of one module, of every source."""

    layer: int
    name: str
    rows: slice


@dataclass(frozen=True)
class Stack:
    """Blocks of unit spectral norm: `rows[C, D]`, the transpose of [block | block | …].

    Kept transposed, so that each block is contiguous.
    """

    rows: Tensor
    groups: tuple[Group, ...]

    @property
    def layers(self) -> list[int]:
        return sorted({group.layer for group in self.groups})

    def of_layers(self, layers: Iterable[int]) -> Stack:
        """The part of the stack that belongs to some layers."""
        chosen = set(layers)
        parts, groups, start = [], [], 0
        for group in self.groups:
            if group.layer in chosen:
                part = self.rows[group.rows]
                groups.append(Group(group.layer, group.name, slice(start, start + len(part))))
                parts.append(part)
                start += len(part)
        return Stack(torch.cat(parts), tuple(groups))


def stack_blocks(layers: Iterable[LoRAWeights]) -> tuple[Stack, list[str]]:
    """Stack the blocks of layers that write to the stream, and name those that are all zero.

    A block holds the singular values and the left singular vectors of a layer's `ΔW` without
    forming it, `B (A Aᵀ)^½`. A norm after the layer is folded in: what it writes along `y` moves
    the stream along `γ ⊙ y`.

    Every block is divided by its spectral norm, so that no layer dominates: raw blocks collapse
    onto the layer that moved most once training goes on. The spectral rather than the Frobenius
    norm, because then a layer's say does not depend on how much else it learned.

    Raises:
        ValueError: blocks of different width.
    """
    members: dict[tuple[int, str], list[Tensor]] = {}
    zero, width, first = [], 0, ""
    for layer in layers:
        block = _block(layer)
        if width and block.shape[1] != width:
            raise ValueError(
                f"{layer.site.name!r} meets the residual stream with width {block.shape[1]}, but "
                f"{first!r} with {width}; give adapters of one model, and check the SiteRules."
            )
        width, first = block.shape[1], first or layer.site.name
        scale = block.abs().max()
        if scale == 0:
            zero.append(layer.site.name)
            continue
        block = block / scale
        block /= torch.linalg.eigvalsh((block @ block.mT).double())[-1].sqrt().float()
        members.setdefault((layer.site.layer, layer.site.name), []).append(block)
    groups, parts, start = [], [], 0
    for (index, name), blocks in sorted(members.items()):
        columns = sum(map(len, blocks))
        groups.append(Group(index, name, slice(start, start + columns)))
        parts += blocks
        start += columns
    return Stack(torch.cat(parts) if parts else torch.zeros(0, width), tuple(groups)), zero


def _block(layer: LoRAWeights) -> Tensor:
    """`[R, D]`, float32 on the CPU: the transpose of the block."""
    lora_A, lora_B = _of_usual_size(layer.lora_A), _of_usual_size(layer.lora_B)
    block = _root(lora_A @ lora_A.mT) @ lora_B.mT
    return layer.site.to_stream(block.mT * layer.scaling, layer.gain).mT.contiguous()


def _of_usual_size(factor: Tensor) -> Tensor:
    """A factor in float32, times the power of two that brings its largest value near 1.

    The size of a block does not count, but its Gram matrices overflow where it is large, and are
    zero where it is small.
    """
    wide = factor.cpu().double()
    _, exponent = math.frexp(float(wide.abs().max()))
    return (wide * 2.0 ** -max(-1000, min(exponent, 1000))).float()


def _root(gram: Tensor) -> Tensor:
    """Square root of a Gram matrix `[R, R]`; a Cholesky factor would need full rank."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp(min=0).sqrt() @ vectors.mT).float()


def largest_by_chance(stack: Stack, draws: int, generator: torch.Generator) -> Tensor:
    """Largest singular values `[F]` of the stack after random sign flips: no alignment.

    In each draw every coordinate of every group gets a sign of its own. That keeps the singular
    values of each group and the size of each coordinate (outlier coordinates stay outliers), and
    destroys alignment between groups.
    """
    counts = [min(_DRAWS_TOGETHER, draws - start) for start in range(0, draws, _DRAWS_TOGETHER)]
    return torch.cat([_flipped_norms(stack, count, generator) for count in counts])


def _flipped_norms(stack: Stack, draws: int, generator: torch.Generator) -> Tensor:
    """Spectral norms `[F]` of flipped stacks: Lanczos on `GᵀG` for all draws at once.

    Golub and Van Loan, Matrix Computations, 10.1. The signs act on the vectors, so no flipped stack
    is ever stored.
    """
    device = generator.device
    shape = (len(stack.groups), stack.rows.shape[1], draws)
    signs = torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8).cpu()
    signs.mul_(2).sub_(1)
    v = torch.randn(len(stack.rows), draws, generator=generator, device=device).cpu()
    v /= v.norm(dim=0)
    previous, beta = torch.zeros_like(v), torch.zeros(draws)
    steps = min(_LANCZOS_STEPS, len(stack.rows))
    tridiagonal = torch.zeros(draws, steps, steps)
    for step in range(steps):
        w = _flipped_gram(stack, signs, v) - beta * previous
        alpha = (w * v).sum(dim=0)
        w -= alpha * v
        tridiagonal[:, step, step] = alpha
        if step:
            tridiagonal[:, step, step - 1] = beta
        beta = w.norm(dim=0)
        previous, v = v, w / beta.clamp(min=torch.finfo(w.dtype).tiny)
    # the lower triangle alone is read
    return torch.linalg.eigvalsh(tridiagonal)[:, -1].clamp(min=0).sqrt()


def _flipped_gram(stack: Stack, signs: Tensor, v: Tensor) -> Tensor:
    """`GᵀG v` for the flipped stacks `G` of all draws, `v[C, F]`."""
    moved = torch.zeros(stack.rows.shape[1], v.shape[1])
    for group, sign in zip(stack.groups, signs, strict=True):
        moved.addcmul_(stack.rows[group.rows].mT @ v[group.rows], sign)
    return torch.cat(
        [
            stack.rows[group.rows] @ (moved * sign)
            for group, sign in zip(stack.groups, signs, strict=True)
        ]
    )
