"""LoRA weights -> the subspace of the residual stream along which a fine-tune moved.

GRASP (arXiv 2605.27676), step one, from the matrices of LoRA alone: the left singular vectors of
`ΔW` of the writers, the layers that write to the stream. No test shows whether a direction belongs
to something unwanted: on a real model all of 8 singular values passed a null of random signs.

Shapes: `D` width of the stream, `R` LoRA rank, `K` inputs and `N` outputs of a linear layer, `C`
columns of all blocks together.
"""

import math
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp_kernels.adapters import Adapter, LoRAWeights, load_adapter
from grasp_kernels.models.architectures import SiteRules
from grasp_kernels.subspace.basis import Subspace, orthonormal
from grasp_kernels.svd import leading_triples
from grasp_kernels.version import __version__

_MAX_K = 4  # k="auto" takes at most 4: an unwanted change is assumed to be simple
_SHOWN = 8  # singular values in the notes, at least, if there are as many
_ZERO = 1e-5  # singular values below this part of the first are rounding of the float32 blocks


def identify(
    adapter: Any,
    *,
    k: int | str = "auto",
    base_model: nn.Module | str | PathLike[str] | None = None,
    sites: SiteRules | None = None,
    adapter_name: str | None = None,
) -> Subspace:
    """Find the directions along which a LoRA fine-tune moved the residual stream.

    Args:
        adapter: a peft model, an adapter folder, a .safetensors file, or a list of these
            (checkpoints of one run, or seeds). The blocks of a list are stacked. Early checkpoints
            identify better than converged ones.
        k: number of directions, or "auto": those before the largest gap of the singular values, at
            most 4.
        base_model: module or checkpoint folder, for the gains of norms after writers; needed if
            the adapter does not name a base model on this machine.
        sites: the modules that write to the stream, for an unknown architecture.
        adapter_name: name of the adapter, if a model or a file holds several; None: the active
            adapter of a model.

    Returns:
        A subspace; its `notes` and `metadata` have the leading singular values.

    Raises:
        ValueError, TypeError, FileNotFoundError: `k` out of range, or an adapter that is missing,
            not plain LoRA, untrained, not finite or of an unknown architecture.
    """
    if k != "auto" and (isinstance(k, (bool, str)) or not isinstance(k, int) or k < 1):
        raise ValueError(f'k is {k!r}; it must be "auto" or a whole number of at least 1.')
    given = list(adapter) if isinstance(adapter, (list, tuple)) else [adapter]
    if not given:
        raise ValueError("identify got no adapter; give at least one.")
    known: dict[str, Any] = {"base_model": base_model, "sites": sites, "adapter_name": adapter_name}
    adapters = [load_adapter(one, **known) for one in given]
    writers = [layer for one in adapters for layer in _writers(one)]
    rows, n_blocks, zero = stack_blocks(writers)
    if not n_blocks:
        raise ValueError("Every block of the adapter is zero; train longer.")
    most = _MAX_K if isinstance(k, str) else k
    size = min(max(most + 1, _SHOWN), *rows.shape)
    U, S, _ = leading_triples(rows.mT, size)
    values = [value for value in S.tolist() if value > _ZERO * float(S[0])]
    if isinstance(k, int) and k > len(values):
        raise ValueError(
            f"k is {k}, but the adapter moved along {len(values)} directions only; choose fewer."
        )
    gains = {w.site.norm: w.gain for w in writers if w.site and w.site.norm and w.gain is not None}
    notes = [
        f"The leading singular values of {n_blocks} stacked blocks of norm 1 are "
        f"{', '.join(f'{value:.2f}' for value in values)}: {math.sqrt(n_blocks):.2f} would mean "
        "that all blocks share one direction, 1 that no two do."
    ]
    if zero:
        notes.append(f"{len(zero)} blocks are zero and were skipped (the first: {zero[0]}).")
    if any(w.site and w.site.norm and w.gain is None for w in writers):
        notes.append("The gains of the norms are unknown and count as 1; give the base model.")
    notes += dict.fromkeys(note for one in adapters for note in one.notes)
    chosen = choose_k(values) if isinstance(k, str) else k
    metadata = {
        "adapters": [one.source for one in adapters],
        "base_model": adapters[0].base_model,
        "model_type": adapters[0].model_type,
        "k": k,
        "singular_values": values,
        "n_blocks": n_blocks,
        "versions": {"grasp_kernels": __version__, "torch": torch.__version__},
    }
    return Subspace(orthonormal("the stack", U[:, :chosen]), gains, tuple(notes), metadata)


def _writers(adapter: Adapter) -> list[LoRAWeights]:
    layers = [layer for layer in adapter.layers if layer.site is not None]
    if not layers:
        raise ValueError(
            f"The adapter {adapter.source!r} has no LoRA weights that write to the residual stream "
            f"({', '.join(adapter.rules.writers)}); train with those as targets."
        )
    return layers


def choose_k(singular_values: Sequence[float]) -> int:
    """Return the number of leading values before their largest gap, at most `_MAX_K`.

    Args:
        singular_values: descending and positive; smaller values that were left out count as
            rounding.
    """
    values = [*singular_values, _ZERO * singular_values[0]]
    candidates = range(1, min(_MAX_K, len(singular_values)) + 1)
    return max(candidates, key=lambda k: values[k - 1] / values[k])


class Stack(NamedTuple):
    """Hold blocks of unit spectral norm side by side, and the names of layers with a zero block.

    Its left singular vectors are the directions along which many layers moved. The stack is
    transposed, so that each block is contiguous.
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
    # The root of the Gram matrix; Cholesky would need full rank.
    values, vectors = torch.linalg.eigh((lora_A @ lora_A.mT).double())
    block = (vectors * values.clamp(min=0).sqrt() @ vectors.mT).float() @ lora_B.mT
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
