"""LoRA weights as blocks in the coordinates of the residual stream, side by side.

The left singular vectors of the stack are the directions that many layers moved along.

Shapes: `D` width of the stream, `R` LoRA rank, `K` inputs and `N` outputs of a linear layer, `C`
columns of all blocks together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_kernels.adapters import LoRAWeights


class Stack(NamedTuple):
    """Blocks of unit spectral norm, and the names of layers whose block is zero.

    Kept transposed, so that each block is contiguous.
    """

    rows: Tensor  # [C, D], the transpose of [block | block | …]
    n_blocks: int
    zero: list[str]


def stack_blocks(layers: Iterable[LoRAWeights]) -> Stack:
    """Stack the blocks of layers that write to the stream.

    A block holds the singular values and the left singular vectors of a layer's `ΔW` without
    forming it, `B (A Aᵀ)^½`. A norm after the layer is folded in: what it writes along `y` moves
    the stream along `γ ⊙ y`.

    Every block is divided by its spectral norm, so that no layer dominates: raw blocks collapse
    onto the layer that moved most once training goes on. The spectral rather than the Frobenius
    norm, because then a layer's say does not depend on how much else it learned.

    Raises:
        ValueError: blocks of different width.
    """
    blocks: list[Tensor] = []
    zero, width, first = [], 0, ""
    for layer in layers:
        block = _block(layer)
        if width and block.shape[1] != width:
            raise ValueError(
                f"{layer.name!r} meets the residual stream with width {block.shape[1]}, but "
                f"{first!r} with {width}; give adapters of one model, and check the SiteRules."
            )
        width, first = block.shape[1], first or layer.name
        scale = block.abs().max()
        if scale == 0:
            zero.append(layer.name)
            continue
        block = block / scale
        block /= torch.linalg.eigvalsh((block @ block.mT).double())[-1].sqrt().float()
        blocks.append(block)
    return Stack(torch.cat(blocks) if blocks else torch.zeros(0, width), len(blocks), zero)


def _block(layer: LoRAWeights) -> Tensor:
    """`[R, D]`, float32 on the CPU: the transpose of the block."""
    lora_A, lora_B = _of_usual_size(layer.lora_A), _of_usual_size(layer.lora_B)
    block = _root(lora_A @ lora_A.mT) @ lora_B.mT
    assert layer.site is not None
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
