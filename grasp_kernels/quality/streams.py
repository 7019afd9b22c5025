"""Hooks on the residual stream after each block.

Shapes: `B` records of a batch, `T` tokens, `D` width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from grasp_kernels.run.stream import find_blocks
from grasp_kernels.sites import model_rules

Change = Callable[[int, Tensor], Tensor]


def blocks_of(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder blocks of a model by layer."""
    _, blocks = find_blocks(model, model_rules(model))
    return dict(enumerate(blocks))


def hook(model: nn.Module, change: Change) -> list[Any]:
    """Replace the output `h[B, T, D]` of each block by `change(layer, h)`; returns the handles."""

    def hook_of(layer: int) -> Callable[..., Any]:
        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return change(layer, output[0]), *output[1:]
            return change(layer, output)

        return replace

    return [
        block.register_forward_hook(hook_of(layer)) for layer, block in blocks_of(model).items()
    ]


@contextmanager
def hooked(model: nn.Module, change: Change) -> Iterator[None]:
    """As `hook`, for a while."""
    with ExitStack() as stack:
        for handle in hook(model, change):
            stack.callback(handle.remove)
        yield


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """What the last forward pass put out after each block, `[B, T, D]` by layer, with its graph."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int, h: Tensor) -> Tensor:
        kept[layer] = h
        return h

    with hooked(model, keep):
        yield kept
