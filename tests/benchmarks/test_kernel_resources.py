"""Every launch compiles for every part, within its limits; no GPU is needed."""

import csv
import os
import subprocess
import sys
from types import ModuleType

import pytest

from grasp_kernels.ops.gpu.launch import PARTS
from tests.helpers.scripts import BENCHMARKS, load_script

pytestmark = pytest.mark.slow

SCRIPT = BENCHMARKS / "kernel_resources.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("kernel_resources")


def test_every_launch_of_every_part() -> None:
    """In a process of its own, since this one has made its kernels for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_table_covers_every_kernel_and_part(script: ModuleType) -> None:
    rows = list(csv.DictReader(script.TABLE.read_text(encoding="utf-8").splitlines()))
    kernels = {
        "divergence_kernel",
        "down_kernel",
        "extended_gemm_kernel",
        "finish_factor_kernel",
        "finish_skinny_kernel",
        "gradients_kernel",
        "product_kernel",
        "token_pass_kernel",
        "total_kernel",
    }
    assert {(row["kernel"], row["part"]) for row in rows} == {
        (kernel, part) for kernel in kernels for part in PARTS
    }
    assert [problem for row in rows for problem in script.problems(row)] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_memory": str(228 << 10)}, "needs 233472 bytes of shared memory of 232448"),
        ({"spilled": "8"}, "spills 8 bytes a thread"),
        ({"instructions": "HMMA=16 UTMALDG=4"}, "has no HGMMA instruction but HMMA=16 UTMALDG=4"),
        ({"instructions": "HGMMA=16 LDGSTS=4"}, "does not use the copy engine"),
    ],
)
def test_a_launch_past_a_limit_is_named(
    script: ModuleType, change: dict[str, str], message: str
) -> None:
    rows = csv.DictReader(script.TABLE.read_text(encoding="utf-8").splitlines())
    row = next(r for r in rows if r["kernel"] == "token_pass_kernel" and r["part"] == "sm_90")
    assert list(script.problems(row)) == []
    (problem,) = script.problems(row | change)
    assert message in problem
