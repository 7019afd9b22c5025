"""The largest memory that a piece of work took: of the GPU, or of the process on Linux."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak(device: str) -> None:
    """Begin to measure; where the system forbids it, the peak is that since the process began."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5", encoding="ascii")  # resets VmHWM


def peak_bytes(device: str) -> int | None:
    """The largest use since the last reset, in bytes; None where it cannot be known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
