"""Forward and backward of several providers, in turn, so that a drifting machine slows all alike.

The order rotates from turn to turn. On a GPU the clock is that of the device, and a buffer larger
than its L2 is written before each measurement, as the layers of a model would have done.
Shapes: T tokens, K in, N out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.kernels.provider import trained

_WARM_UP = 2  # calls before the first measurement
_FLUSHED = 1 << 28  # bytes, several times the largest L2 there is
# Cycles that the GPU idles before a measurement, about 5 ms: the launches of a layer are queued by
# then, as in a training step, whose Python runs ahead of the GPU.
_HEAD_START = 8_000_000


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


@dataclass(frozen=True)
class Measured:
    """peak_memory: bytes beyond what was allocated before the call; None on a CPU."""

    forward: Times
    backward: Times
    both: Times
    peak_memory: int | None

    def as_row(self) -> dict[str, Any]:
        """As it stands in a row."""
        return asdict(self)


class Work(Protocol):
    """What is timed; `reset` is not."""

    def reset(self) -> None: ...

    def forward(self) -> Tensor: ...

    def backward(self, y: Tensor) -> None: ...


class LayerWork:
    """`y = layer(x)` and its gradients, fresh as in a step."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.layer, self.dy = layer, dy
        self.leaf = x.detach().requires_grad_()

    def reset(self) -> None:
        for leaf in (self.leaf, *trained(self.layer)):
            leaf.grad = None

    def forward(self) -> Tensor:
        return self.layer(self.leaf)

    def backward(self, y: Tensor) -> None:
        y.backward(self.dy)


def time_in_turn(
    works: Mapping[str, Work],
    device: torch.device,
    *,
    rounds: int,
) -> dict[str, Measured | Exception]:
    """Name -> its times, or what it raised before the first measurement."""
    clock = _CudaClock(device) if device.type == "cuda" else _WallClock()
    raised: dict[str, Exception] = {}
    peaks: dict[str, int | None] = {}
    for name, work in works.items():
        try:
            for _ in range(_WARM_UP):
                peaks[name] = clock.peak(work)
        except Exception as error:
            raised[name] = error.with_traceback(None)  # which would keep its tensors
            work.reset()
    running = [name for name in works if name not in raised]
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for turn in range(rounds):
        first = turn % max(1, len(running))
        for name in running[first:] + running[:first]:
            measured[name].append(clock.step(works[name]))
    times = {name: _summary(pairs, peaks[name]) for name, pairs in measured.items()}
    return {name: raised[name] if name in raised else times[name] for name in works}


def _summary(pairs: list[tuple[float, float]], peak: int | None) -> Measured:
    return Measured(
        Times.of([forward for forward, _ in pairs]),
        Times.of([backward for _, backward in pairs]),
        Times.of([forward + backward for forward, backward in pairs]),
        peak,
    )


class _WallClock:
    def peak(self, work: Work) -> int | None:
        """Do the work once; a CPU keeps no account of its memory."""
        self.step(work)
        return None

    def step(self, work: Work) -> tuple[float, float]:
        """Milliseconds of one forward and one backward."""
        work.reset()
        begin = time.perf_counter()
        y = work.forward()
        middle = time.perf_counter()
        work.backward(y)
        end = time.perf_counter()
        return (middle - begin) * 1e3, (end - middle) * 1e3


class _CudaClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device=device)

    def peak(self, work: Work) -> int | None:
        """Do the work once and watch the allocator."""
        work.reset()
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work.backward(work.forward())
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def step(self, work: Work) -> tuple[float, float]:
        """Milliseconds of one forward and one backward, between events of the device.

        What is queued within the head start is timed without its launches; the gaps of work that
        takes longer to launch count.
        """
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        stream = torch.cuda.current_stream(self.device)
        work.reset()
        self.flushed.zero_()
        torch.cuda._sleep(_HEAD_START)
        begin.record(stream)
        y = work.forward()
        middle.record(stream)
        work.backward(y)
        end.record(stream)
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(middle), middle.elapsed_time(end)
