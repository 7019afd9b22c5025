"""Forward and backward of several layers, in turn, so that a drifting machine slows all alike.

Shapes: T tokens, K in, N out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from grasp_kernels.bench.providers import trained


@dataclass(frozen=True)
class Times:
    """Milliseconds: median and 20 % and 80 % quantiles."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Times:
        fifths = quantiles(milliseconds, n=5, method="inclusive")
        return cls(median(milliseconds), fifths[0], fifths[3])


def time_in_turn(
    layers: Mapping[str, nn.Module], x: Tensor, dy: Tensor, *, rounds: int, warmup: int = 2
) -> dict[str, dict[str, Times]]:
    """Name -> {"forward", "backward", "both"} -> Times, for `x[T, K]` and `dy[T, N]`."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for turn in range(warmup + rounds):
        for name, layer in layers.items():
            times = _step(layer, x, dy)
            if turn >= warmup:
                measured[name].append(times)
    return {
        name: {
            "forward": Times.of([forward for forward, _ in times]),
            "backward": Times.of([backward for _, backward in times]),
            "both": Times.of([forward + backward for forward, backward in times]),
        }
        for name, times in measured.items()
    }


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[float, float]:
    """Milliseconds of one forward and one backward; gradients are fresh, as in a step."""
    leaf = x.detach().requires_grad_()
    for parameter in trained(layer):
        parameter.grad = None
    begin = _now(x)
    y = layer(leaf)
    middle = _now(x)
    y.backward(dy)
    end = _now(x)
    return (middle - begin) * 1e3, (end - middle) * 1e3


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
