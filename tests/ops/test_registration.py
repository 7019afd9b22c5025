"""The operator as torch sees it: schema, fake tensors, compilation, activation checkpointing."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

import grasp_kernels as gk
from grasp_kernels.ops import project_gradient
from grasp_kernels.ops.lora_linear.dropout import device_seed
from tests.helpers.backends import everywhere, suited
from tests.helpers.oracle import Case, budget, make_inputs, relative_error


@pytest.fixture(autouse=True, scope="module")
def fresh_compiler_cache() -> Iterator[None]:
    """Inductor's cache on disk knows a graph by its text: not by what an operator's fake says."""
    with fresh_cache():
        yield


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """A function is compiled again eight times at most, all tests together."""
    torch._dynamo.reset()


PROJECTED = Case(Q=4, bias=True, lora_bias=True)


def registered_arguments(case: Case, backend: str) -> tuple[Any, ...]:
    """The arguments of `torch.ops.grasp_kernels.lora_linear`, everything differentiable."""
    inputs = make_inputs(case)
    names = ("x", "base", "weight", "bias", "lora_A", "lora_B", "lora_bias")
    leaves = [None if inputs[n] is None else inputs[n].requires_grad_() for n in names]
    seed = device_seed(inputs["x"]) if case.dropout_p else None
    others = (inputs["write_basis"], seed)
    residual = case.project == "residual"
    options = (case.scaling, case.dropout_p, residual, case.closed, False)
    return (*leaves, *others, *options, backend)


@everywhere
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        replace(PROJECTED, dropout_p=0.5),
        replace(PROJECTED, closed=False, project="weights"),
        replace(PROJECTED, base=True, dropout_p=0.5, project="weights"),
    ],
    ids=str,
)
def test_opcheck(case: Case, backend: str, device: str) -> None:
    arguments = registered_arguments(suited(replace(case, device=device), backend), backend)
    torch.library.opcheck(torch.ops.grasp_kernels.lora_linear.default, arguments)


@everywhere
@pytest.mark.parametrize("base", [False, True])
def test_opcheck_of_the_backward(base: bool, backend: str, device: str) -> None:
    case = suited(replace(PROJECTED, base=base, device=device), backend)
    x, given, *operands = (
        a.detach() if isinstance(a, torch.Tensor) else a
        for a in registered_arguments(case, backend)
    )
    y, *saved = torch.ops.grasp_kernels.lora_linear(x, given, *operands)
    needs = [True, False, not base, True, True, False, base]
    torch.library.opcheck(
        torch.ops.grasp_kernels.lora_linear_backward.default,
        (torch.randn_like(y), x, *saved, needs, *operands),
    )


class Layer(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        inputs = make_inputs(case)
        self.A = torch.nn.Parameter(inputs["lora_A"])
        self.B = torch.nn.Parameter(inputs["lora_B"])
        self.frozen = {k: inputs[k] for k in ("weight", "bias", "write_basis")}
        self.dropout_p = case.dropout_p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gk.lora_linear(
            x, lora_A=self.A, lora_B=self.B, scaling=0.5, dropout_p=self.dropout_p, **self.frozen
        )


def gradients(run: Any, layer: Layer, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(7)
    x = x.detach().requires_grad_()
    y = run(x)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, [x, layer.A, layer.B], dy)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"backend": "aot_eager"}, {"backend": "inductor"}, {"mode": "reduce-overhead"}],
    ids=lambda options: next(iter(options.values())),
)
def test_compiles_into_one_graph(options: dict[str, str]) -> None:
    case = Case(Q=2, bias=True)
    layer, x = Layer(case), make_inputs(case)["x"]
    compiled = torch.compile(layer, fullgraph=True, **options)
    for eager, found in zip(gradients(layer, layer, x), gradients(compiled, layer, x), strict=True):
        assert relative_error(found, eager) <= 2 * budget(0.0, torch.float32, case.N)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_library_calls_are_traced_and_others_are_not(backend: str, dropout_p: float) -> None:
    """So that the compiler of torch sees products of matrices, forward and backward."""
    layer = Layer(Case(Q=2, bias=True, dropout_p=dropout_p))
    layer.frozen["backend"] = backend
    targets: list[str] = []

    def noted(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=noted))
    gradients(compiled, layer, make_inputs(Case())["x"])
    opaque = [target for target in targets if "grasp_kernels" in target]
    assert bool(opaque) == (backend == "reference")
    assert sum("mm" in target for target in targets) >= (0 if opaque else 8)


@pytest.mark.parametrize("Q", [0, 2])
def test_a_base_product_elsewhere_compiles_with_it(Q: int) -> None:
    case = Case(Q=Q)
    layer = Layer(case)
    weight = layer.frozen["weight"]
    layer.frozen["weight"] = None

    def run(x: torch.Tensor) -> torch.Tensor:
        layer.frozen["base"] = x @ weight.mT
        return layer(x)

    x = make_inputs(case)["x"]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for eager, found in zip(gradients(run, layer, x), gradients(compiled, layer, x), strict=True):
        assert torch.equal(eager, found)


@pytest.mark.slow
def test_inductor_uses_one_mask_in_forward_and_backward() -> None:
    """y is linear in x, so ⟨dy, y⟩ = ⟨dx, x⟩ holds for the very mask that the forward drew."""
    case = Case(dropout_p=0.5, dtype=torch.float64)
    layer, inputs = Layer(case), make_inputs(case)
    x = inputs["x"].requires_grad_()
    y = torch.compile(layer, fullgraph=True)(x)
    (dx,) = torch.autograd.grad(y, x, inputs["dy"])
    torch.testing.assert_close((y * inputs["dy"]).sum(), (dx * x).sum())


def test_two_dropouts_in_one_compiled_graph_differ() -> None:
    layer = Layer(Case(dropout_p=0.5))
    x = make_inputs(Case())["x"]
    run = torch.compile(lambda x: (layer(x), layer(x)), fullgraph=True, backend="aot_eager")
    first, second = run(x)
    assert not torch.equal(first, second)


def test_dynamic_lengths_compile_once() -> None:
    case = Case(Q=2)
    layer = Layer(case)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = set()  # some releases of torch take two for the first length
    for T in (5, 17, 33, 64):
        x = torch.randn(T, case.K)
        assert torch.equal(compiled(x), layer(x))
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_recomputes_the_same_mask(use_reentrant: bool) -> None:
    case = Case(Q=2, dropout_p=0.5)
    layer, x = Layer(case), make_inputs(case)["x"]

    def recomputed(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    if use_reentrant:  # torch refuses autograd.grad there
        torch.manual_seed(7)
        leaf = x.detach().requires_grad_()
        y = recomputed(leaf)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        found = [y.detach(), leaf.grad, layer.A.grad, layer.B.grad]
    else:
        found = gradients(recomputed, layer, x)
    for eager, again in zip(gradients(layer, layer, x), found, strict=True):
        assert torch.equal(eager, again)


def test_project_gradient_is_the_identity_with_a_projected_gradient() -> None:
    inputs = make_inputs(Case(Q=3))
    V, dy = inputs["write_basis"], inputs["dy"]
    y = torch.randn_like(dy, requires_grad=True)
    out = project_gradient(y, V)
    assert torch.equal(out, y)
    (gradient,) = torch.autograd.grad(out, y, dy)
    torch.testing.assert_close(gradient, dy - dy @ V @ V.mT)
    compiled = torch.compile(project_gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(y, V), y, dy)[0], gradient)
    with pytest.raises(ValueError, match=r"shape \(40, 3\) but y has 7 features"):
        project_gradient(torch.randn(2, 7), V)
