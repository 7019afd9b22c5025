"""The machine of a run: what rows need to be compared, its measured rates, its free memory."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cost import Rates
from grasp_kernels.version import __version__

# One product of this many rows and columns, one copy of this many bytes: large enough for the peak.
_SIDE = {"cuda": 8192, "cpu": 1024}
_COPIED = {"cuda": 1 << 30, "cpu": 1 << 26}
_REPEATS, _AT_A_TIME = 5, {"cuda": 10, "cpu": 1}  # to wait for a GPU takes its time too


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device)))
        if cuda
        else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else None,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "peft": _installed("peft"),
        "grasp_kernels": __version__,
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.is_file() else []
    found = (line.split(":", 1)[1].strip() for line in names if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The commit of a source checkout, with "+" when files differ from it; None elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    return _said("git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*")


def _said(*command: str) -> str | None:
    """The first line that a program prints, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """The best of a few large products and copies."""
    side, n_bytes = _SIDE[device.type], _COPIED[device.type]
    a = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty_like(a)
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    multiply = _best_seconds(lambda: torch.mm(a, a.T, out=product), device)
    copy = _best_seconds(lambda: target.copy_(source), device)
    return Rates(2 * side**3 / multiply / 1e12, 2 * n_bytes / copy / 1e9)


def _best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    work()
    seconds, calls = [], _AT_A_TIME[device.type]
    for _ in range(_REPEATS):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(device)
        seconds.append((time.perf_counter() - begin) / calls)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
