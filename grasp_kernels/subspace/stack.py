"""LoRA weights as blocks in the coordinates of the residual stream, side by side.

The left singular vectors of the stack are the directions along which many layers moved.

Shapes: `D` width of the stream, `R` LoRA rank, `K` inputs and `N` outputs of a linear layer, `C`
columns of all blocks together.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_kernels.adapters import LoRAWeights


class Stack(NamedTuple):
    """Hold blocks of unit spectral norm, and the names of layers with a zero block.

    The stack is transposed, so that each block is contiguous.
    """

    rows: Tensor  # [C, D], the transpose of [block | block | …]
    n_blocks: int
    zero: list[str]


def stack_blocks(layers: Iterable[LoRAWeights]) -> Stack:
    """Stack the blocks of layers that write to the stream.

    A block holds the singular values and the left singular vectors of a layer's `ΔW` without
    forming it, `B (A Aᵀ)^½`. A norm after the layer is folded in: an output `y` of the layer moves
    the stream along `γ ⊙ y`.

    Every block is divided by its spectral norm, so that no layer dominates: as training goes on,
    raw blocks collapse onto the layer that moved most. The norm is spectral rather than Frobenius,
    because the weight of a layer then does not depend on other things that it learned.

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
    """Return the transpose of the block, `[R, D]`, float32 on the CPU."""
    lora_A, lora_B = _of_usual_size(layer.lora_A), _of_usual_size(layer.lora_B)
    block = _root(lora_A @ lora_A.mT) @ lora_B.mT
    assert layer.site is not None
    return layer.site.scaled(block.mT * layer.scaling, layer.gain).mT.contiguous()


def _of_usual_size(factor: Tensor) -> Tensor:
    """Return a factor in float32, scaled by a power of two so that its largest value is near 1.

    The size of a block does not matter in the end, but the Gram matrices of a large block overflow,
    and those of a small block are zero.
    """
    wide = factor.cpu().double()
    _, exponent = math.frexp(float(wide.abs().max()))
    return (wide * 2.0 ** -max(-1000, min(exponent, 1000))).float()


def _root(gram: Tensor) -> Tensor:
    """Return the square root of a Gram matrix `[R, R]`; Cholesky would need full rank."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp(min=0).sqrt() @ vectors.mT).float()
