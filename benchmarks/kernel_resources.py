"""Compile every launch configuration for every part, without a GPU, and table what each takes.

    python benchmarks/kernel_resources.py            # compare with the table in results/
    python benchmarks/kernel_resources.py --write    # make it anew

The launches are those that the operator makes: it runs on meta tensors, for a part that is not
there. A launch fails the check if it needs more shared memory than a program may have, if it spills
on sm_90, or if it lacks the matrix instructions that were meant. The table is compared only with
one that the same version of Triton made.

Triton's own JIT binds the arguments and compiles, as it would for a launch; only the driver that it
asks for the GPU stands for a part that is not there. Its wheel carries the disassemblers; AMD's
code objects say it in their metadata.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from grasp_kernels.files import whole_file
from grasp_kernels.ops.gated import ACTIVATIONS
from grasp_kernels.ops.gpu import gated, linear_kl
from grasp_kernels.ops.gpu.launch import PARTS, Launch, dry_run
from grasp_kernels.ops.lora_linear.operands import Needs, Operands
from grasp_kernels.ops.lora_linear.triton.backend import backward, forward

TABLE = Path(__file__).parent / "results" / "kernel-resources.csv"
COLUMNS = (
    "kernel", "part", "case", "blocks", "num_warps", "num_stages",
    "shared_memory", "registers", "spilled", "instructions", "triton",
)  # fmt: skip

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
class Case:
    """One call of the operator. Shapes: T tokens, K in, N out, R rank, Q basis size."""

    T: int = 8192
    K: int = 4096
    N: int = 4096
    R: int = 16
    Q: int = 4
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.0
    bias: bool = False
    tf32: bool = False
    base: bool = False  # the base product is another library's
    activation: str = ""  # of the product of a gated MLP, in place of a layer
    softcap: float | None = None  # of T rows of N logits, in place of a layer; 0.0: without a cap

    def __str__(self) -> str:
        default = Case()
        fields = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return " ".join(f"{k}={v}".replace("torch.", "") for k, v in fields.items()) or "plain"


WIDE = {"K": 14336, "N": 14336}  # beyond the extended product: the library's, then `addmm`
ODD = {"T": 8191, "K": 4095, "N": 4097}  # nothing aligned: no copy engine, masks everywhere
CASES = (
    *(Case(R=R) for R in (16, 32, 64, 128)),
    Case(dropout_p=0.1),
    Case(dropout_p=0.1, **WIDE),
    Case(base=True, dropout_p=0.1),
    Case(**ODD),
    *(Case(dtype=torch.float32, R=R) for R in (16, 64)),
    Case(dtype=torch.float32, tf32=True),
    *(Case(K=14336, activation=name) for name in ACTIVATIONS),
    Case(**ODD, activation="silu"),
    Case(T=256, N=128256, softcap=0.0),
    Case(T=255, N=32001, softcap=30.0, dtype=torch.float32),
)
# Launches of the same blocks that differ in a flag; registers are tightest on sm_90.
MORE = (
    Case(Q=0),
    Case(Q=32),
    Case(T=512),
    Case(bias=True),
    Case(dropout_p=0.1, R=64),
    Case(dropout_p=0.1, R=128),
    Case(**ODD, dropout_p=0.1, R=128, Q=32),
    Case(base=True),
    Case(dtype=torch.float16),
    Case(dtype=torch.float32, R=128),
    Case(dtype=torch.float32, dropout_p=0.1),
    Case(dtype=torch.float32, **ODD),
)


def compiled(part: str) -> Iterator[tuple[Case, Launch, Any]]:
    """Every launch of every case on a part with its kernel, each machine code once."""
    seen = set()
    for case in CASES + (MORE if part == "sm_90" else ()):
        torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
        with dry_run(PARTS[part]) as run:
            _call(case)
        for made in run.launches:
            kernel = compile_for(part, made)
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                yield case, made, kernel


def _call(case: Case) -> None:
    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    if case.activation:
        given = empty(case.T, case.K), empty(case.T, case.K), case.activation
        gated.gradients(gated.product(*given), *given)
        return
    if case.softcap is not None:
        logits = empty(case.T, case.N, dtype=torch.float32)
        linear_kl.divergence(logits, logits, case.softcap or None, case.dtype)
        return
    T, K, N, R, Q = case.T, case.K, case.N, case.R, case.Q
    A, B = empty(R, K, dtype=torch.float32), empty(N, R, dtype=torch.float32)
    op = Operands(
        weight=None if case.base else empty(N, K),
        bias=empty(N) if case.bias else None,
        lora_A=A,
        lora_B=B,
        lora_bias=None,
        write_basis=empty(N, Q, dtype=torch.float32) if Q else None,
        dropout_seed=empty(1, dtype=torch.int64) if case.dropout_p else None,
        scaling=2.0,
        dropout_p=case.dropout_p,
        residual=True,
        closed=True,
    )
    x = empty(T, K)
    y, saved = forward(x, op, empty(T, N) if case.base else None)
    needs = Needs(
        x=True,
        weight=False,
        bias=False,
        lora_A=True,
        lora_B=True,
        lora_bias=False,
        base=case.base,
    )
    backward(torch.empty_like(y), x, saved, op, needs)


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


def rows_of(part: str) -> list[dict[str, str]]:
    """The table of one part."""
    return [_row(part, *found) for found in compiled(part)]


def _row(part: str, case: Case, made: Launch, kernel: Any) -> dict[str, str]:
    found = resources(kernel)
    sizes = {k: v for k, v in made.arguments.items() if k.startswith("BLOCK") and v}
    return {
        "kernel": made.kernel.__name__.strip("_"),
        "part": part,
        "case": str(case),
        "blocks": " ".join(f"{k.removeprefix('BLOCK_')}={v}" for k, v in sizes.items()),
        "num_warps": str(made.num_warps),
        "num_stages": str(made.num_stages),
        "shared_memory": str(found.shared_memory),
        "registers": str(found.registers),
        "spilled": str(found.spilled),
        "instructions": " ".join(f"{k}={v}" for k, v in found.instructions.items()),
        "triton": triton.__version__,
    }


def problems(row: dict[str, str]) -> Iterator[str]:
    """What is wrong with a launch, a sentence each."""
    part = PARTS[row["part"]]
    name = f"{row['kernel']} ({row['case']}, {row['blocks']}) on {row['part']}"
    if int(row["shared_memory"]) > part.shared_memory:
        yield f"{name} needs {row['shared_memory']} bytes of shared memory of {part.shared_memory}."
    if row["part"] == "sm_90" and int(row["spilled"]) > 0:
        yield f"{name} spills {row['spilled']} bytes a thread."
    wanted = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
    products = ("down_kernel", "token_pass_kernel", "extended_gemm_kernel")
    half = "float32" not in row["case"]
    opcode = wanted.get(row["part"], "v_mfma")
    if half and row["kernel"] in products and opcode not in row["instructions"]:
        yield f"{name} has no {opcode} instruction but {row['instructions'] or 'none'}."
    aligned = half and "4095" not in row["case"]
    if aligned and part.tma and row["kernel"] in products and "UTMALDG" not in row["instructions"]:
        skinny = row["kernel"] == "extended_gemm_kernel" and (
            "14336" in row["case"] or "base" in row["case"]
        )
        if not skinny:
            yield f"{name} does not use the copy engine."


def main() -> int:
    parser = argparse.ArgumentParser(description="Resources of every kernel launch, without a GPU.")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with ProcessPoolExecutor(max_workers=2) as pool:
        rows = [row for found in pool.map(rows_of, arguments.parts) for row in found]
    found = [problem for row in rows for problem in problems(row)]
    print(*found, sep="\n", end="\n" if found else "")
    text = _csv(rows)
    if arguments.write:
        with whole_file(TABLE) as partial:
            partial.write_text(text, encoding="utf-8")
    else:
        found += _differences(rows)
    print(f"{len(rows)} launches compiled with Triton {triton.__version__}, {len(found)} problems")
    return 1 if found else 0


def _differences(rows: list[dict[str, str]]) -> list[str]:
    stored = list(csv.DictReader(io.StringIO(TABLE.read_text(encoding="utf-8"))))
    if any(row["triton"] != triton.__version__ for row in stored):
        print(f"{TABLE.name} is of another version of Triton, so only limits are checked")
        return []
    parts = {row["part"] for row in rows}
    old = [row for row in stored if row["part"] in parts]
    changed = [row for row in rows if row not in old] + [row for row in old if row not in rows]
    if changed:
        print(f"{TABLE.name} does not hold what was compiled; make it anew with --write:")
        print(*(",".join(row.values()) for row in changed), sep="\n")
    return [f"{len(changed)} rows differ"] if changed else []


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
