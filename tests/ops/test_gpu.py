"""What only a GPU can show: graphs, streams, more than 2³¹ elements, layers of a real size."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import grasp_kernels as gk
from grasp_kernels.ops.lora_linear.registry import KERNELS, computes
from tests.helpers.oracle import Case, check_against_oracle, differentiate, make_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")
LARGE = Case(T=2048, K=4096, N=1024, R=16, Q=4, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "case",
    [
        LARGE,
        replace(LARGE, T=2047, K=4088, N=1032),
        replace(LARGE, T=777, K=4095, N=1023),
        replace(LARGE, dropout_p=0.1, R=64),
        replace(LARGE, R=128, Q=32, K=1024, N=4096),
        replace(LARGE, K=14336, N=512, dtype=torch.float16),
        replace(LARGE, T=300, dtype=torch.float32),
    ],
    ids=str,
)
def test_real_shapes(case: Case, backend: str) -> None:
    if not computes(backend, case.dtype) or (backend == "cuda" and case.N % 8):
        with pytest.raises(ValueError, match="use backend='auto'"):
            check_against_oracle(case, backend)
        return
    assert check_against_oracle(case, backend) == {}


def captured(call: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The results of a replay, after the graph's buffers were overwritten."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for tensor in found.values():
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("backend", [*KERNELS, "aten"])
def test_a_captured_graph_replays_the_same_results(backend: str) -> None:
    inputs = make_inputs(LARGE)
    expected = differentiate(LARGE, inputs, backend=backend)
    found = captured(lambda: differentiate(LARGE, inputs, backend=backend))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("backend", KERNELS)
def test_a_captured_graph_draws_new_masks(backend: str) -> None:
    case = replace(LARGE, dropout_p=0.5)
    inputs = make_inputs(case)
    arguments = {k: v for k, v in inputs.items() if k != "dy"}

    def call() -> dict[str, torch.Tensor]:
        return {"y": gk.lora_linear(**arguments, scaling=1.0, dropout_p=0.5, backend=backend)}

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()["y"]
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


@pytest.mark.parametrize("backend", KERNELS)
def test_work_goes_to_the_current_stream(backend: str) -> None:
    inputs = make_inputs(LARGE)
    expected = differentiate(LARGE, inputs, backend=backend)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what runs elsewhere would be over long before
        late = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        found = differentiate(LARGE, late, backend=backend)
    side.synchronize()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("backend", KERNELS)
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """T·N and T·K pass 2³¹; rows at both ends are compared with a call on them alone."""
    free, _ = torch.cuda.mem_get_info()
    K, N, R, Q, T = 16448, 16448, 16, 4, 131072
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free >> 30}")
    g = torch.Generator("cuda").manual_seed(0)
    dtype = {"device": "cuda", "dtype": torch.bfloat16, "generator": g}
    x, dy = torch.randn(T, K, **dtype), torch.randn(T, N, **dtype)
    weight = torch.randn(N, K, **dtype).mul_(K**-0.5)
    A = torch.randn(R, K, **dtype).mul_(K**-0.5)
    B = torch.randn(N, R, **dtype).mul_(R**-0.5)
    V = torch.linalg.qr(torch.randn(N, Q, device="cuda", generator=g))[0]
    ends = torch.cat([torch.arange(256), torch.arange(T - 256, T)]).cuda()

    def run(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.requires_grad_()
        y = gk.lora_linear(leaf, weight, None, A, B, 1.0, write_basis=V, backend=backend)
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]

    expected = run(x[ends].clone(), dy[ends].clone())
    whole: Any = run(x, dy)
    for found, tensor in zip(whole, expected, strict=True):
        error = (found[ends].float() - tensor.float()).norm() / tensor.float().norm()
        assert error <= torch.finfo(torch.bfloat16).eps


def test_the_operator_waits_for_nothing() -> None:
    """No host synchronisation in forward or backward, with dropout and closed factors."""
    case = replace(LARGE, dropout_p=0.1)
    inputs = make_inputs(case)
    for backend in (*KERNELS, "aten"):
        differentiate(case, inputs, backend=backend)
        torch.cuda.set_sync_debug_mode("error")
        try:
            differentiate(case, inputs, backend=backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
