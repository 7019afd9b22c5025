"""What ptxas says of each kernel: recorded while nvcc runs, and read back.

    python ptxas.py nvcc … -o FILE.o     # runs nvcc and leaves its remarks in FILE.o.ptxas

The text lies beside the object because a build that finds the object up to date runs no nvcc.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".ptxas"
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_STACK = re.compile(r"(\d+) bytes cumulative stack size")
_SHARED = re.compile(r"(\d+) bytes smem")
_ROUTINE = re.compile(
    rf"{_FRAME.pattern}|{_USED.pattern}|{_ENTRY.pattern}"
    r"|Function properties for|Compile time =|bytes gmem"
)


@dataclass
class Kernel:
    """A kernel's machine code for one architecture. Memory is in bytes, local of a thread."""

    symbol: str
    architecture: str
    registers: int = 0
    local_memory: int = 0
    spilled: int = 0  # stores and loads, of the functions that it calls too
    shared_memory: int = 0  # static


def record(command: list[str]) -> int:
    """Runs nvcc, keeps what it says and shows what is no routine report of ptxas."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if "-o" in command:
        Path(command[command.index("-o") + 1] + SUFFIX).write_text(done.stderr, encoding="utf-8")
    for line in done.stderr.splitlines():
        if not _ROUTINE.search(line):
            print(line, file=sys.stderr)
    return done.returncode


def parse(text: str) -> list[Kernel]:
    """The kernels that the output of `ptxas -v` tells of."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(Kernel(entry.group(1), entry.group(2)))
        elif kernels:
            _note(kernels[-1], line)
    return kernels


def _note(kernel: Kernel, line: str) -> None:
    if frame := _FRAME.search(line):
        stack, stores, loads = map(int, frame.groups())
        kernel.local_memory = max(kernel.local_memory, stack)
        kernel.spilled += stores + loads
    elif used := _USED.search(line):
        kernel.registers = int(used.group(1))
        if total := _STACK.search(line):
            kernel.local_memory = max(kernel.local_memory, int(total.group(1)))
        if shared := _SHARED.search(line):
            kernel.shared_memory = int(shared.group(1))


def read(objects: Iterable[Path]) -> list[Kernel]:
    """The kernels of compiled objects; none of those that were compiled without a record."""
    records = [Path(f"{file}{SUFFIX}") for file in objects]
    texts = [file.read_text(encoding="utf-8") for file in records if file.exists()]
    return [kernel for text in texts for kernel in parse(text)]


if __name__ == "__main__":
    sys.exit(record(sys.argv[1:]))
