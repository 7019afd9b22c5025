"""What a kernel launch takes of a GPU, read off its machine code; no GPU is needed for it.

Triton compiles for a part that is not there, and its wheel carries the disassemblers. AMD's code
objects say it in their metadata.
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

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

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
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: bytes a program, registers a thread, and instruction counts."""

    shared_memory: int
    registers: int
    spilled: int  # bytes of local memory a thread
    instructions: dict[str, int]


def compile_for(target: str, made: Launch) -> Resources:
    """Compile a launch, specialised on its arguments as Triton's JIT would, and read its code."""
    options = {"num_warps": made.num_warps, "num_stages": made.num_stages}
    source = ASTSource(made.kernel, *_specialized(made))
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_amd if TARGETS[target].backend == "hip" else _read_cuda
    return read(compiled)


def specialization(made: Launch) -> str:
    """What makes two launches of one kernel the same machine code."""
    return repr(_specialized(made))


def _specialized(made: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes of the arguments."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(made.kernel.params):
        value = made.arguments[parameter.name]
        kind, constant = _kind(value, parameter)
        signature[parameter.name] = kind
        if constant:
            constants[(index,)] = value
        elif not parameter.do_not_specialize and _divisible(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _kind(value: Any, parameter: Any) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is compiled in."""
    if parameter.is_constexpr or value is None:
        return "constexpr", True
    if isinstance(value, TensorDescriptor):
        inner = _TYPES[value.base.dtype]
        return f"tensordesc<{inner}{list(value.block_shape)}>", False
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}", False
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", True
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), False


def _divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return type(value) is int and value % 16 == 0


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
