"""Which backend computes a call: by name, by rule, and why one cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grasp_kernels as gk
from grasp_kernels.ops.lora_linear import registry
from grasp_kernels.ops.lora_linear.operands import Operands
from tests.helpers.backends import operands
from tests.helpers.oracle import Case, make_inputs


def in_a_fresh_process(code: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CALL = """
import torch, grasp_kernels as gk
try:
    x, W, A, B = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
    gk.lora_linear(x, W, None, A, B, 1.0, backend="triton")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_a_gpu_the_kernels_say_so() -> None:
    code = "from grasp_kernels.ops import backends; print(backends('cpu')['triton'])"
    assert in_a_fresh_process(code).startswith("it needs a GPU")
    assert in_a_fresh_process(CALL) == (
        "backend 'triton' cannot run on cpu: it needs a GPU "
        "(on a CPU only Triton's interpreter runs kernels); use backend='auto'."
    )


@pytest.mark.slow
def test_without_triton_everything_else_works() -> None:
    missing = "import sys; sys.modules['triton'] = None\n"
    assert in_a_fresh_process(missing + CALL) == (
        "backend 'triton' cannot run on cpu: triton is not installed; use backend='auto'."
    )
    works = """
import grasp_kernels as gk, torch
from grasp_kernels.ops import backends
print(backends("cpu"))
x = torch.randn(5, 4, requires_grad=True)
gk.lora_linear(x, torch.ones(3, 4), None, torch.ones(1, 4), torch.ones(3, 1), 1.0).sum().backward()
"""
    missing_too = dict.fromkeys(("cuda", "triton"), "triton is not installed")
    expected = {**missing_too, "aten": None, "reference": None}
    assert in_a_fresh_process(missing + works) == str(expected)


@pytest.mark.slow
def test_auto_is_the_library_where_nothing_was_measured() -> None:
    code = "import sys, grasp_kernels as gk, torch\n" + CALL.replace('"triton"', '"auto"')
    assert in_a_fresh_process(code + "print('triton' in sys.modules)") == "False"


def test_auto_passes_over_a_backend_that_refuses_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "prefers_kernels", lambda x, op: True)

    def taken(x: torch.Tensor, op: Operands) -> str:
        return registry.select("auto", x, op).__name__.removesuffix(".backend").split(".")[-1]

    x = torch.empty(3, 24, device="cuda" if torch.cuda.is_available() else "cpu")
    assert taken(x.bfloat16(), operands(24, 16, 4)) == "cuda"
    assert taken(x, operands(24, 16, 4)) == "triton"
    assert taken(x.bfloat16(), operands(24, 12, 4)) == "triton"
    assert taken(x.double(), operands(24, 16, 4)) == "aten"


class OnGPU:
    """`x[T, 4096]` of a call."""

    device = torch.device("cuda")

    def __init__(self, T: int, dtype: torch.dtype = torch.bfloat16, is_cuda: bool = True) -> None:
        self.shape, self.dtype, self.is_cuda = (T, 4096), dtype, is_cuda


def test_auto_takes_kernels_for_long_calls_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, least = operands(4096, 4096, 16), registry.LEAST_TOKENS

    def takes(x: OnGPU, op: Operands, capability: tuple[int, int] = (9, 0)) -> bool:
        registry._is_hopper.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
        return registry.prefers_kernels(x, op)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.version, "hip", None)
    assert takes(OnGPU(least), layer)
    assert not takes(OnGPU(least - 1), layer)
    assert not takes(OnGPU(least), operands(4096, 1024, 16))
    assert takes(OnGPU(4 * least), operands(4096, 1024, 16))
    assert not takes(OnGPU(least, torch.float16), layer)
    assert not takes(OnGPU(least), layer._replace(weight=None))
    assert not takes(OnGPU(least), layer._replace(exact=True))
    assert not takes(OnGPU(least, is_cuda=False), layer)
    for other in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert not takes(OnGPU(least), layer, other)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not takes(OnGPU(least), layer)  # gfx90a calls itself 9.0 too
    registry._is_hopper.cache_clear()


def test_the_rule_is_what_the_rows_say() -> None:
    """On the H200, with the kernels as they are; what `registry` says of the H100 counts too."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "backends.json"
    wins = dict.fromkeys(("NVIDIA H200", "NVIDIA H100 80GB HBM3"), (0, 0, 0))
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        assert row["dtype"] == "bfloat16" and row["T"] >= registry.LEAST_TOKENS
        aten, *kernels = (row["milliseconds"][name] for name in ("aten", *registry.KERNELS))
        found = (1, *(int(time < aten) for time in kernels))
        wins[row["device"]] = tuple(map(sum, zip(wins[row["device"]], found, strict=True)))
    assert wins == {"NVIDIA H200": (12, 12, 12), "NVIDIA H100 80GB HBM3": (5, 2, 4)}


def test_the_kernels_refuse_what_they_cannot_compute() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(Case(dtype=torch.float64, device=device))
    del inputs["dy"]
    for name in registry.KERNELS:
        with pytest.raises(ValueError, match=r"x has torch\.float64; use backend='auto'"):
            gk.lora_linear(**inputs, scaling=1.0, backend=name)
    from grasp_kernels.ops.lora_linear.triton import backend

    wide = torch.empty(1, dtype=torch.bfloat16).expand(2**27, 8)
    assert "R + Q = 16 and T = 134217728" in str(backend.refuses(wide, operands(8, 8, 16)))


@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_seeds_are_drawn_where_they_are_read(backend: str) -> None:
    """Library calls read theirs on the host: one on a GPU would have to be waited for."""
    module = registry.load(backend)
    assert not isinstance(module, str)
    seed = module.draw_seed(torch.empty(2, 3, device="meta"))
    assert seed.device.type == ("meta" if backend in registry.KERNELS else "cpu")
    assert (seed.shape, seed.dtype) == ((1,), torch.int64)
