"""What `backend="auto"` takes: a kernel only where it was measured to be the fastest.

`measured.json` holds one row a shape and GPU, `{"device", "dtype", "T", "K", "N", "R", "Q",
"milliseconds": {backend: forward + backward}}`, which `grasp-kernels bench --adopt` makes from
benchmark rows. The nearest row of the same GPU and dtype decides; without one, and where a call is
too short to be worth launching kernels from Python, it is `aten`.
Shapes: T tokens, K in, N out, R LoRA rank, Q write basis size.
"""

from __future__ import annotations

import json
import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.ops.lora_linear.operands import Operands

TABLE = Path(__file__).with_name("measured.json")
SAFE = ("aten", "reference")
_SIZES = ("T", "K", "N", "R", "Q")
# Rows are times of the GPU, whose launches are queued ahead. With fewer tokens the GPU waits for
# Python: a decoder layer of Llama-3.1-8B takes 6.2 ms with `aten`, 7.2 with `cuda` and 9.8 with
# `triton` at T = 2048 on an H200, and 20.2, 19.8 and 19.8 at 8192.
LEAST_TOKENS = 4096
# The same for narrow layers: `T K N` of a square layer of 4096 with 4096 tokens. Predicted from
# Python's time a layer, which does not depend on its width; narrow models were not measured.
_LEAST_WORK = 1 << 36
# Times this close to the fastest count as equal; then what costs Python least is taken.
_TIE = 1.02
_LAUNCHES = {"cuda": 0, "aten": 1}


def order(x: Tensor, op: Operands) -> tuple[str, ...]:
    """Backends for `x[T, K]` and a layer, the fastest first."""
    if not x.is_cuda or op.weight is None:  # rows were measured with the base product
        return SAFE
    if op.exact:  # kernels round the adapter to the dtype of the activations
        return SAFE
    (N, K), T = op.weight.shape, x.shape[0]
    if T < LEAST_TOKENS or T * K * N < _LEAST_WORK:
        return SAFE
    Q = 0 if op.write_basis is None else op.write_basis.shape[1]
    device = torch.cuda.get_device_name(x.device)
    return fastest(device, str(x.dtype).removeprefix("torch."), T, K, N, op.lora_A.shape[0], Q)


@cache
def timed(where: torch.device) -> frozenset[str]:
    """The backends that were timed on such a device, which they are once their results pass."""
    if where.type != "cuda":
        return frozenset()
    device = torch.cuda.get_device_name(where)
    return frozenset(n for row in _rows() if row["device"] == device for n in row["milliseconds"])


@cache
def prefers_kernels(where: torch.device) -> bool:
    """Whether a kernel of ours was measured to be the fastest for some shape on this device."""
    if where.type != "cuda":
        return False
    device = torch.cuda.get_device_name(where)
    times = (row["milliseconds"] for row in _rows() if row["device"] == device)
    return any(min(found, key=found.__getitem__) not in SAFE for found in times)


@lru_cache(maxsize=4096)  # every length is a key
def fastest(device: str, dtype: str, *sizes: int) -> tuple[str, ...]:
    """The backends of the nearest row, fastest first, then those that run everywhere.

    Of those within two percent of the fastest, what launches least from Python comes first.

    Distance is in factors of two, summed over the sizes; ties go to the earlier row.
    """
    rows = [row for row in _rows() if (row["device"], row["dtype"]) == (device, dtype)]
    if not rows:
        return SAFE

    def distance(row: dict[str, Any]) -> float:
        pairs = zip((row[name] for name in _SIZES), sizes, strict=True)
        return sum(abs(math.log2((1 + theirs) / (1 + ours))) for theirs, ours in pairs)

    times: dict[str, float] = min(rows, key=distance)["milliseconds"]
    close = _TIE * min(times.values())

    def rank(name: str) -> tuple[float, int]:
        return max(close, times[name]), _LAUNCHES.get(name, len(_LAUNCHES))

    return tuple(dict.fromkeys((*sorted(times, key=rank), *SAFE)))


@cache
def _rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    return found
