"""Hooks on the residual stream after each block.

Shapes: `B` records of a batch, `T` tokens, `D` width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from grasp_kernels.identification.frozen_model import kept_outputs, output_hook
from grasp_kernels.run.stream import blocks_by_layer
from grasp_kernels.sites import model_rules

Change = Callable[[int, Tensor], Tensor]


def blocks_of(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder blocks of a model by layer."""
    return blocks_by_layer(model, model_rules(model))


def hook(model: nn.Module, change: Change) -> list[Any]:
    """Replace the output `h[B, T, D]` of each block by `change(layer, h)`; returns the handles."""

    return [
        block.register_forward_hook(output_hook(partial(change, layer)))
        for layer, block in blocks_of(model).items()
    ]


@contextmanager
def hooked(model: nn.Module, change: Change) -> Iterator[None]:
    """As `hook`, for a while."""
    with ExitStack() as stack:
        for handle in hook(model, change):
            stack.callback(handle.remove)
        yield


def recorded(model: nn.Module) -> AbstractContextManager[dict[int, Tensor]]:
    """What the last forward pass put out after each block, `[B, T, D]` by layer, with its graph."""
    return kept_outputs(blocks_of(model))
