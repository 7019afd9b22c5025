"""What a kernel launch takes of a GPU, read off its machine code; no GPU is needed for it.

Triton's own JIT binds the arguments and compiles, as it would for a launch; only the driver that it
asks for the GPU stands for a part that is not there. Its wheel carries the disassemblers; AMD's
code objects say it in their metadata.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from grasp_kernels.ops.gpu.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Instructions of interest: matrix products and bulk copies by generation.
_OPCODES = ("HMMA", "HGMMA", "UTCHMMA", "UTMALDG", "UTMASTG", "LDGSTS", "FFMA", "v_mfma")


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: bytes a program, registers a thread, and instruction counts."""

    shared_memory: int
    registers: int
    spilled: int  # bytes of local memory a thread
    instructions: dict[str, int]


class _Absent:
    """The driver of a part that is not there: it says what to compile for."""

    def __init__(self, part: str) -> None:
        self.part = part

    def get_current_target(self) -> GPUTarget:
        """What Triton's backends compile for."""
        return TARGETS[self.part]

    def get_current_device(self) -> str:
        """By which the JIT keeps what it compiled."""
        return self.part

    def get_current_stream(self, device: str) -> int:
        """Asked for even where nothing is launched."""
        return 0


def compile_for(part: str, made: Launch) -> Any:
    """The compiled kernel of a launch, `hash` the same for the same machine code."""
    driver.set_active(_Absent(part))
    try:
        options = {"num_warps": made.num_warps, "num_stages": made.num_stages}
        return made.kernel.warmup(grid=made.grid, **made.arguments, **options)
    finally:
        driver.set_active(None)  # the next launch finds the real one


def resources(compiled: Any) -> Resources:
    """Read off the machine code of a compiled kernel."""
    return (_read_amd if "amdgcn" in compiled.asm else _read_cuda)(compiled)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _read_cuda(compiled: Any) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", file)
        code = _tool("nvdisasm", "--print-code", file)
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("STACK", "LOCAL"))
    return Resources(compiled.metadata.shared, registers, stack + local, _count(code))


def _read_amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[-1])
    spilled = int(re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)[-1])
    return Resources(compiled.metadata.shared, registers, spilled, _count(text))


def _count(code: str) -> dict[str, int]:
    words = Counter(re.findall(r"[A-Za-z_][A-Za-z_0-9]*", code))
    found = {
        opcode: sum(n for word, n in words.items() if word.startswith(opcode))
        for opcode in _OPCODES
    }
    return {opcode: n for opcode, n in found.items() if n}
