"""Every backend against the float64 oracle, with the error of the stock layer as the budget."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grasp_kernels as gk
from grasp_kernels.ops.lora_linear.registry import BACKENDS, KERNELS
from tests.helpers.backends import PLACES, everywhere, suited
from tests.helpers.oracle import (
    DIFFERENTIABLE,
    Case,
    budget,
    check_against_oracle,
    differentiate,
    differentiate_stock,
    make_inputs,
    relative_error,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def in_dtypes(*cases: Case) -> list[Any]:
    """Parameters (backend, device, case): every case in every dtype that the backend computes."""
    made = (
        (backend, device, replace(case, dtype=dtype))
        for backend, device in PLACES
        for case in cases
        for dtype in DTYPES
    )
    return [p for p in made if suited(p[2], p[0]) == p[2]]


def budgets_of(case: Case, backend: str) -> dict[str, float]:
    """What rounding may cost each result of a case, from what it costs the stock layer."""
    inputs = make_inputs(case)
    torch.manual_seed(4)
    stock = differentiate_stock(case, inputs, backend=backend)
    torch.manual_seed(4)
    oracle = differentiate_stock(case, inputs, torch.float64, backend=backend)
    longest = max(case.T, case.K, case.N)
    return {
        name: budget(relative_error(stock[name], exact), case.dtype, longest)
        for name, exact in oracle.items()
    }


WITH_FLOAT64 = tuple(name for name in BACKENDS if name not in KERNELS)
PROJECTED = Case(Q=4)
# One case a feature, then the products that interact: the projection with closure and dropout.
CASES = [
    Case(),
    Case(T=0, Q=1),
    Case(T=1, Q=1),
    Case(R=1, Q=1),
    Case(R=3, Q=1),
    Case(K=160, N=144, R=12, Q=32),
    Case(T=130, K=136, N=120, R=128, Q=4),
    Case(T=257, R=16, Q=4, bias=True),
    Case(bias=True, lora_bias=True, Q=4),
    Case(expanded_dy=True, Q=4),
    Case(base=True),
    Case(base=True, T=0, Q=1),
    Case(base=True, T=1, Q=1),
    Case(base=True, T=257, K=136, N=120, R=16, Q=4, lora_bias=True),
    Case(base=True, expanded_dy=True, Q=4),
    *(  # any three of these four options in all combinations
        replace(PROJECTED, project=project, closed=closed, dropout_p=p, base=base)
        for project in ("residual", "weights")
        for closed in (True, False)
        for p in (0.0, 0.3)
        for base in [(project == "weights") ^ (not closed) ^ (p > 0)]
    ),
]
MIXED = [
    replace(PROJECTED, dtype=torch.bfloat16, adapter_dtype=torch.float32),
    replace(PROJECTED, dtype=torch.float16, adapter_dtype=torch.float32, dropout_p=0.1),
    replace(PROJECTED, dtype=torch.float32, adapter_dtype=torch.bfloat16),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("backend", "device", "case"), in_dtypes(*CASES), ids=str)
def test_backend_is_within_budget_of_the_oracle(backend: str, device: str, case: Case) -> None:
    assert check_against_oracle(replace(case, device=device), backend) == {}


@pytest.mark.usefixtures("poisoned")
@everywhere
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_the_adapter_may_have_another_dtype(backend: str, device: str, case: Case) -> None:
    if suited(case, backend) != case:
        with pytest.raises(ValueError, match=r"x has torch\.float32; use backend='auto'"):
            check_against_oracle(replace(case, device=device), backend)
        return
    assert check_against_oracle(replace(case, device=device), backend) == {}


LONGEST = 40  # of the sums
SHAPES = {
    "T": st.integers(0, LONGEST),
    "K": st.integers(1, LONGEST),
    "N": st.integers(1, LONGEST),
    "R": st.integers(1, 20),
    "Q": st.integers(0, 5),
    "closed": st.booleans(),
    "project": st.sampled_from(("residual", "weights")),
    "dropout_p": st.sampled_from((0.0, 0.5, 1.0)),
    "base": st.booleans(),
}


def results_and_oracle(
    backend: str, dtype: torch.dtype, shape: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    device = dict(reversed(PLACES))[backend]
    case = Case(**shape, dtype=dtype, bias=True, lora_bias=True, device=device)
    case = replace(case, Q=min(case.Q, case.N))
    inputs = make_inputs(case)
    torch.manual_seed(1)
    found = differentiate(case, inputs, backend=backend)
    torch.manual_seed(1)
    oracle = differentiate_stock(case, inputs, torch.float64, backend=backend)
    return ((name, found[name].double(), exact) for name, exact in oracle.items())


@pytest.mark.parametrize("backend", WITH_FLOAT64)
@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_any_shape_is_exact_in_float64(backend: str, **shape: Any) -> None:
    carried = LONGEST**2 * torch.finfo(torch.float64).eps  # by sums of sums of numbers of size 1
    for name, found, exact in results_and_oracle(backend, torch.float64, shape):
        torch.testing.assert_close(found, exact, rtol=carried, atol=carried, msg=name)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_any_shape_of_the_kernels(**shape: Any) -> None:
    """They have no float64, and in float32 what sums carry is nearer to what a term is worth."""
    carried = 2 * LONGEST * torch.finfo(torch.float32).eps
    for name, found, exact in results_and_oracle("triton", torch.float32, shape):
        torch.testing.assert_close(found, exact, rtol=carried, atol=carried, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("term", "shows_in", "case"),
    [
        ("dX", "dx", PROJECTED),
        ("dX", "dbase", replace(PROJECTED, base=True)),
        ("dS", "dlora_A", replace(PROJECTED, closed=False, base=True)),
        ("dS", "dlora_A", replace(PROJECTED, closed=False)),
        ("dB", "dlora_B", replace(PROJECTED, closed=False, project="weights")),
        ("closure", "y", PROJECTED),
        ("dropout", "y", replace(PROJECTED, dropout_p=0.3)),
        ("dropout", "dx", replace(PROJECTED, dropout_p=0.3)),
        ("dropout", "dlora_A", replace(PROJECTED, dropout_p=0.3)),
        ("dropout", "dx", replace(PROJECTED, dropout_p=0.3, base=True)),
    ],
)
def test_a_missing_term_would_be_over_budget(
    term: str, shows_in: str, case: Case, dtype: torch.dtype
) -> None:
    """The test of the test: against an oracle without the term, the reference must fail."""
    assert shows_in in check_against_oracle(replace(case, dtype=dtype), "reference", without=term)


@pytest.mark.parametrize("backend", WITH_FLOAT64)
@pytest.mark.parametrize("Q", [0, 3])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("base", [False, True])
def test_gradcheck(backend: str, Q: int, dropout_p: float, base: bool) -> None:
    """With project="weights" and closure the gradients are the true ones of the forward."""
    case = Case(T=4, K=6, N=5, R=2, Q=Q, dtype=torch.float64, base=base)
    inputs = make_inputs(replace(case, bias=True, lora_bias=True))
    names = [name for name in DIFFERENTIABLE if inputs[name] is not None]

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return gk.lora_linear(
            **{"weight": None, "bias": None} | dict(zip(names, leaves, strict=True)),
            scaling=0.7,
            write_basis=inputs["write_basis"],
            project="weights",
            dropout_p=dropout_p,
            backend=backend,
        )

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)  # along random directions


@everywhere
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        replace(PROJECTED, dropout_p=0.2, dtype=torch.bfloat16),
        replace(PROJECTED, dropout_p=0.2, base=True),
    ],
    ids=str,
)
def test_a_rerun_is_bitwise_identical(case: Case, backend: str, device: str) -> None:
    case = suited(replace(case, device=device), backend)
    inputs, runs = make_inputs(case), []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(differentiate(case, inputs, backend=backend))
    for name, first in runs[0].items():
        assert torch.equal(first, runs[1][name]), name


@everywhere
@pytest.mark.parametrize("project", ["residual", "weights"])
def test_a_base_product_computed_elsewhere(project: str, backend: str, device: str) -> None:
    """The base product outside, under autograd, is the operator with a weight."""
    case = suited(replace(PROJECTED, project=project, dropout_p=0.2, device=device), backend)
    inputs = make_inputs(case)
    torch.manual_seed(6)
    whole = differentiate(case, inputs, backend=backend)
    x, W, A, B = (inputs[n].clone().requires_grad_() for n in ("x", "weight", "lora_A", "lora_B"))
    base = x @ W.mT
    before = base.detach().clone()
    torch.manual_seed(6)
    y = gk.lora_linear(
        x,
        None,
        None,
        A,
        B,
        case.scaling,
        base=base,
        write_basis=inputs["write_basis"],
        project=project,
        dropout_p=case.dropout_p,
        backend=backend,
    )
    found = torch.autograd.grad(y, (x, W, A, B), inputs["dy"])
    assert torch.equal(base, before)
    names = ("dx", "dweight", "dlora_A", "dlora_B")
    for name, gradient in {"y": y.detach(), **dict(zip(names, found, strict=True))}.items():
        assert relative_error(gradient, whole[name]) <= 4 * torch.finfo(case.dtype).eps, name


def test_the_base_decides_the_dtype() -> None:
    inputs = make_inputs(replace(PROJECTED, base=True))
    arguments = {k: v for k, v in inputs.items() if k not in ("dy", "base")}
    base = inputs["base"].bfloat16()
    x = inputs["x"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):  # the base layer has seen to it already
        y = gk.lora_linear(**arguments, base=base, scaling=0.5)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == torch.float32


@everywhere
def test_any_number_of_leading_dimensions(backend: str, device: str) -> None:
    inputs = make_inputs(suited(replace(PROJECTED, T=30, device=device), backend))
    arguments = {k: v for k, v in inputs.items() if k not in ("x", "dy")}
    flat = gk.lora_linear(inputs["x"], **arguments, scaling=0.5, backend=backend)
    for shape in ((2, 15), (2, 3, 5), (1, 30)):
        x = inputs["x"].view(*shape, -1)
        y = gk.lora_linear(x, **arguments, scaling=0.5, backend=backend)
        assert torch.equal(y, flat.view(*shape, -1))
    single = gk.lora_linear(inputs["x"][0], **arguments, scaling=0.5, backend=backend)
    assert single.shape == flat[0].shape


@everywhere
def test_strided_inputs(backend: str, device: str) -> None:
    case = suited(replace(PROJECTED, T=16, device=device), backend)
    inputs = make_inputs(case)
    plain, budgets = differentiate(case, inputs, backend=backend), budgets_of(case, backend)
    strided = dict(inputs)
    strided["x"] = inputs["x"].mT.contiguous().mT
    strided["dy"] = torch.stack([inputs["dy"], inputs["dy"]], dim=2)[..., 0]
    strided["weight"] = inputs["weight"].mT.contiguous().mT
    for name, found in differentiate(case, strided, backend=backend).items():
        assert relative_error(found, plain[name]) <= 2 * budgets[name], name


@everywhere
def test_retain_graph_gives_the_same_gradients_again(backend: str, device: str) -> None:
    inputs = make_inputs(suited(replace(PROJECTED, device=device), backend))
    A = inputs["lora_A"].requires_grad_()
    arguments = {k: v for k, v in inputs.items() if k != "dy"}
    y = gk.lora_linear(**arguments, scaling=0.5, dropout_p=0.5, backend=backend)
    first = torch.autograd.grad(y, A, inputs["dy"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, A, inputs["dy"])[0])


def test_unneeded_gradients_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from grasp_kernels.ops.lora_linear import aten

    asked = []
    original = aten.backward

    def spy(dy, x, saved, op, needs):  # type: ignore[no-untyped-def]
        asked.append(needs)
        found = original(dy, x, saved, op, needs)
        assert [g is not None for g in found] == list(needs)
        return found

    monkeypatch.setattr(aten, "backward", spy)
    inputs = make_inputs(PROJECTED)
    dy = inputs.pop("dy")
    inputs["lora_B"].requires_grad_()
    gk.lora_linear(**inputs, scaling=0.5, backend="aten").backward(dy)
    assert asked[0]._asdict() == dict.fromkeys(asked[0]._fields, False) | {"lora_B": True}


def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs(Case())
    x = inputs["x"].requires_grad_()
    arguments = {k: v for k, v in inputs.items() if k != "dy"}
    (gradient,) = torch.autograd.grad(
        gk.lora_linear(**arguments, scaling=0.5).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_what_a_linear_layer_casts(dtype: torch.dtype) -> None:
    inputs = make_inputs(replace(PROJECTED, bias=True))
    arguments = {k: v for k, v in inputs.items() if k != "dy"}
    with torch.autocast("cpu", dtype=dtype):
        y = gk.lora_linear(**arguments, scaling=0.5)
    cast = arguments | {name: arguments[name].to(dtype) for name in ("x", "weight", "bias")}
    assert y.dtype == dtype
    with torch.autocast("cpu", dtype=dtype):  # outside of it, the float32 adapter is not rounded
        assert torch.equal(y, gk.lora_linear(**cast, scaling=0.5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(40, 47)}, ValueError, "x has shape"),
        (
            {"lora_B": torch.zeros(40, 5)},
            ValueError,
            r"lora_B has shape \(40, 5\), expected \(40, 4\)",
        ),
        ({"write_basis": torch.zeros(48, 4)}, ValueError, r"write_basis has shape \(48, 4\)"),
        ({"lora_A": torch.zeros(0, 48), "lora_B": torch.zeros(40, 0)}, ValueError, "rank 0"),
        (
            {"x": torch.zeros(33, 48, dtype=torch.bfloat16)},
            TypeError,
            "weight is torch.float32 but x is",
        ),
        ({"lora_A": torch.zeros(4, 48, dtype=torch.int64)}, TypeError, "a float dtype"),
        ({"lora_A": torch.zeros(4, 48, device="meta")}, ValueError, "lora_A is on meta"),
        ({"weight": None}, ValueError, "weight is None; pass that of the base layer"),
        ({"base": torch.zeros(33, 40)}, ValueError, "base replaces weight and bias"),
        (
            {"weight": None, "base": torch.zeros(32, 40)},
            ValueError,
            r"base has shape \(32, 40\), expected \(33, 40\)",
        ),
        ({"weight": None, "base": torch.zeros(40)}, ValueError, r"x \(33, 48\) and base \(40,\)"),
        ({"project": "stream"}, ValueError, "project is 'stream'; use one of"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
        ({"backend": "tpu"}, ValueError, "backend 'tpu' is unknown"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    inputs = make_inputs(PROJECTED)
    del inputs["dy"]
    with pytest.raises(error, match=message):
        gk.lora_linear(**(inputs | {"scaling": 0.5} | change))


def test_every_backend_runs_somewhere_here() -> None:
    """Or the tests of this file would pass over it."""
    assert {backend for backend, _ in PLACES} == set(BACKENDS)
