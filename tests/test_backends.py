"""Which backend computes a call: by name, by measurement, and why one cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grasp_kernels as gk
from grasp_kernels.bench.adopt import adopt
from grasp_kernels.ops import dispatch
from grasp_kernels.ops.lora_linear import measured, registry
from grasp_kernels.ops.lora_linear.operands import Operands
from grasp_kernels.testing import Case, make_inputs


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


def test_without_a_gpu_the_kernels_say_so() -> None:
    code = "import grasp_kernels as gk; print(gk.backends('cpu')['triton'])"
    assert in_a_fresh_process(code).startswith("it needs a GPU")
    assert in_a_fresh_process(CALL) == (
        "backend 'triton' cannot run on cpu: it needs a GPU "
        "(on a CPU only Triton's interpreter runs kernels); use backend='auto' for one that can."
    )


def test_without_triton_everything_else_works() -> None:
    missing = "import sys; sys.modules['triton'] = None\n"
    assert in_a_fresh_process(missing + CALL) == (
        "backend 'triton' cannot run on cpu: triton is not installed; "
        "use backend='auto' for one that can."
    )
    works = """
import grasp_kernels as gk, torch
print(gk.backends("cpu"))
A = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
U, S, Vh = gk.randomized_svd(A, 3)
x = torch.randn(5, 4, requires_grad=True)
gk.lora_linear(x, torch.ones(3, 4), None, torch.ones(1, 4), torch.ones(3, 1), 1.0).sum().backward()
"""
    missing_too = dict.fromkeys(("cuda", "triton"), "triton is not installed")
    expected = {**missing_too, "aten": None, "reference": None}
    assert in_a_fresh_process(missing + works) == str(expected)


def test_auto_is_the_library_where_nothing_was_measured() -> None:
    code = "import sys, grasp_kernels as gk, torch\n" + CALL.replace('"triton"', '"auto"')
    assert in_a_fresh_process(code + "print('triton' in sys.modules)") == "False"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "measured.json"
    monkeypatch.setattr(measured, "TABLE", file)
    caches = (measured._rows, measured.fastest)
    for cached in caches:
        cached.cache_clear()
    yield file  # type: ignore[misc]
    for cached in caches:
        cached.cache_clear()


def row(device: str = "GPU", T: int = 8192, K: int = 4096, N: int = 4096, **times: float) -> dict:
    sizes = {"T": T, "K": K, "N": N, "R": 16, "Q": 4}
    return {"device": device, "dtype": "bfloat16", **sizes, "milliseconds": times}


def test_the_nearest_measured_shape_decides(table: Path) -> None:
    rows = [
        row(triton=1.0, aten=2.0),
        row(T=512, triton=3.0, aten=2.0),
        row(K=14336, triton=2.0, aten=2.03),
        row(N=14336, triton=2.0, aten=2.1, cuda=2.03),
        row(device="other", triton=9.0, aten=2.0),
    ]
    table.write_text(json.dumps({"rows": rows}))

    def fastest(device: str, dtype: str, *sizes: int) -> str:
        return measured.fastest(device, dtype, *sizes)[0]

    assert fastest("GPU", "bfloat16", 8192, 4096, 4096, 16, 4) == "triton"
    assert fastest("GPU", "bfloat16", 30000, 4096, 4096, 8, 0) == "triton"
    assert fastest("GPU", "bfloat16", 700, 4096, 4096, 16, 4) == "aten"
    assert fastest("GPU", "bfloat16", 8192, 14336, 4096, 16, 4) == "aten"  # as good as a tie
    assert fastest("GPU", "bfloat16", 8192, 4096, 14336, 16, 4) == "cuda"
    assert fastest("other", "bfloat16", 8192, 4096, 4096, 16, 4) == "aten"
    assert measured.fastest("new", "bfloat16", 8192, 4096, 4096, 16, 4) == measured.SAFE
    assert measured.fastest("GPU", "float32", 8192, 4096, 4096, 16, 4) == measured.SAFE


def test_every_order_ends_with_what_runs_everywhere(table: Path) -> None:
    table.write_text(json.dumps({"rows": [row(triton=1.0, aten=2.0)]}))
    assert measured.fastest("GPU", "bfloat16", 1, 1, 1, 1, 0) == ("triton", "aten", "reference")


def test_what_was_timed_has_passed(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench --adopt` takes rows of results within the budget alone."""
    table.write_text(json.dumps({"rows": [row(triton=1.0, aten=2.0), row("other", cuda=1.0)]}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "GPU")
    measured.timed.cache_clear()
    assert measured.timed(torch.device("cuda")) == {"triton", "aten"}
    assert measured.timed(torch.device("cpu")) == set()
    measured.timed.cache_clear()


def test_auto_passes_over_a_backend_that_refuses_the_call() -> None:
    order = ("cuda", "triton", "aten")

    def taken(x: torch.Tensor, op: Operands) -> str:
        return dispatch.select(registry.PACKAGE, order, "auto", x.device, x, op).__name__.split(
            "."
        )[-1]

    x = torch.empty(3, 24, device="cuda" if torch.cuda.is_available() else "cpu")
    assert taken(x.bfloat16(), operands(24, 16, 4)) == "cuda"
    assert taken(x, operands(24, 16, 4)) == "triton"
    assert taken(x.bfloat16(), operands(24, 12, 4)) == "triton"
    assert taken(x.double(), operands(24, 16, 4)) == "aten"


def test_the_stored_table_is_well_formed() -> None:
    for stored in json.loads(measured.TABLE.read_text(encoding="utf-8"))["rows"]:
        assert set(stored) == set(row())
        assert "aten" in stored["milliseconds"]
        assert set(stored["milliseconds"]) <= set(registry.BACKENDS)


def test_on_a_cpu_nothing_is_looked_up() -> None:
    inputs = make_inputs(Case())
    names = ("weight", "bias", "lora_A", "lora_B", "lora_bias", "write_basis")
    tensors = (*(inputs[n] for n in names), *(None,) * 5)
    assert measured.order(inputs["x"], Operands(*tensors, 1.0, 0.0, True, True)) == measured.SAFE
    assert not measured.prefers_kernels(torch.device("cpu"))


def test_short_calls_are_the_library_s(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.write_text(json.dumps({"rows": [row(triton=1.0, aten=2.0)]}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "GPU")

    class OnGPU:
        is_cuda, device, dtype = True, torch.device("cuda"), torch.bfloat16

        def __init__(self, T: int) -> None:
            self.shape = (T, 4096)

    layer = operands(4096, 4096, 16)
    assert measured.order(OnGPU(measured.LEAST_TOKENS), layer)[0] == "triton"  # type: ignore[arg-type]
    assert measured.order(OnGPU(measured.LEAST_TOKENS - 1), layer) == measured.SAFE  # type: ignore[arg-type]
    narrow = operands(4096, 1024, 16)
    assert measured.order(OnGPU(measured.LEAST_TOKENS), narrow) == measured.SAFE  # type: ignore[arg-type]


def operands(K: int, N: int, R: int, Q: int = 0) -> Operands:
    """A layer of these sizes that nobody computes."""
    factors, basis = (torch.empty(R, K), torch.empty(N, R)), torch.empty(N, Q) if Q else None
    return Operands(
        torch.empty(N, K), None, *factors, None, basis, *(None,) * 5, 1.0, 0.0, True, True
    )


def test_the_kernels_refuse_what_they_cannot_compute() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(Case(dtype=torch.float64, device=device))
    del inputs["dy"]
    for name in registry.KERNELS:
        with pytest.raises(ValueError, match=r"x has torch\.float64; use backend='auto'"):
            gk.lora_linear(**inputs, scaling=1.0, backend=name)
    from grasp_kernels.ops.lora_linear.triton import backend

    wide = torch.empty(1, dtype=torch.bfloat16).expand(2**27, 8)
    assert "134217728 tokens and R + Q = 16" in str(backend.refuses(wide, operands(8, 8, 16)))


def benchmark_row(provider: str, milliseconds: float | None, **changes: object) -> dict:
    return {
        "level": "linear",
        "provider": provider,
        "backend": provider.split("-")[1],
        "projects": provider.endswith("projected"),
        "writes": True,
        "device": "GPU",
        "capability": "9.0",
        "dtype": "bfloat16",
        **{"T": 8192, "K": 4096, "N": 4096, "R": 16, "Q": 4},
        "both": {"median": milliseconds},
        **changes,
    }


def test_rows_of_the_benchmark_become_the_table(table: Path) -> None:
    table.write_text(json.dumps({"rows": [row(triton=9.0, aten=8.0), row(T=1, triton=1, aten=2)]}))
    rows = [
        benchmark_row("grasp-aten-projected", 2.0),
        benchmark_row("grasp-triton-projected", 1.0),
        benchmark_row("grasp-aten", 1.5),
        benchmark_row("grasp-triton", 3.0),
        benchmark_row("grasp-aten", 1.0, K=14336),
        benchmark_row("grasp-triton", None, K=14336),  # wrong: it was not timed
        benchmark_row("grasp-aten-projected", 5.0, N=1024, writes=False),
        benchmark_row("grasp-triton-projected", 4.0, N=1024, writes=False),
        benchmark_row("grasp-aten-projected", 5.0, T=2048),
        benchmark_row("grasp-triton-projected", 4.0, T=2048),  # Python would not keep up
        benchmark_row("grasp-triton", 0.1, device="AMD EPYC", capability=None),
        benchmark_row("grasp-auto", 0.1),
        benchmark_row("grasp-triton-padded-projected", 0.1),
    ]
    assert adopt(rows, table) == 3
    stored = json.loads(table.read_text())["rows"]
    expected = [row(T=1, triton=1, aten=2), row(triton=1.0, aten=2.0), row(triton=3.0, aten=1.5)]
    expected.append(row(N=1024, triton=4.0, aten=5.0))
    expected[2]["Q"] = expected[3]["Q"] = 0
    assert sorted(stored, key=str) == sorted(expected, key=str)
    assert measured.fastest("GPU", "bfloat16", 8192, 4096, 4096, 16, 4)[0] == "triton"
    assert measured.fastest("GPU", "bfloat16", 8192, 4096, 4096, 16, 0)[0] == "aten"
    with pytest.raises(ValueError, match="no row compares a kernel with aten on a GPU"):
        adopt(rows[:1], table)


@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_seeds_are_drawn_where_they_are_read(backend: str) -> None:
    """Library calls read theirs on the host: one on a GPU would have to be waited for."""
    module = dispatch.load(registry.PACKAGE, backend)
    assert not isinstance(module, str)
    seed = module.draw_seed(torch.empty(2, 3, device="meta"))
    assert seed.device.type == ("meta" if backend in registry.KERNELS else "cpu")
    assert (seed.shape, seed.dtype) == ((1,), torch.int64)
