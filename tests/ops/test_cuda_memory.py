"""No CUDA kernel reads or writes outside of its tensors: their tests under the address sanitizer.

On a GPU it is compute-sanitizer that watches (benchmarks/gpu_check).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import emulator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="compute-sanitizer does it there"),
]
ROOT = Path(__file__).parents[2]
PASSES = "test_down_pass or test_sum_over_tokens or test_gradient_pass"
CHOSEN = f"({PASSES}) and dtype0 and (sm_80-1 or sm_90-1) or test_any_strides and dtype0"
BEYOND = """
import ctypes, torch
from tools import emulator
emulator.load()
from grasp_kernels.ops.lora_linear.cuda import passes
rows, claimed = 60, 61
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
address = malloc(ctypes.c_size_t(2 * 64 * rows))
memory = (ctypes.c_char * (2 * 64 * claimed)).from_address(address)
x = torch.frombuffer(memory, dtype=torch.bfloat16).view(claimed, 64)
passes.down(x, torch.zeros(4, 64, dtype=torch.bfloat16))
"""


def watched(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | emulator.sanitized() | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def test_kernels_stay_within_their_tensors() -> None:
    tests = str(Path(__file__).with_name("test_cuda_kernels.py"))
    done = watched("-m", "pytest", "-p", "no:cacheprovider", "-n", "0", tests, "-k", CHOSEN)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_a_row_too_many_would_be_seen() -> None:
    done = watched("-c", BEYOND)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
