"""A call that was checked before: the same bits as the whole way, and every change is noticed."""

from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from grasp_kernels import cpu
from grasp_kernels.layers import linear, plan
from grasp_kernels.ops.lora_linear import registry
from tests.helpers.plans import DTYPES, K, N, T, a_layer, an_input, everything, planned

pytest_plugins = ("tests.helpers.plans",)
pytestmark = pytest.mark.usefixtures("kind")
find_compiled = plan.compiled.__wrapped__


# --- the same numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"Q": 0},
        {},
        {"closed": False},
        {"project": "weights"},
        {"bias": True, "lora_bias": True},
        {"lora_dropout": 0.3},
        {"lora_dropout": 0.3, "Q": 0},
        {"lora_dropout": 1.0},
        {"conv": True, "fan_in_fan_out": True},
    ],
    ids=str,
)
def test_a_plan_gives_the_bits_of_the_whole_way(
    options: dict[str, Any], autocast: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype != "float32" and not cpu.multiplies(torch.bfloat16):
        pytest.skip("this CPU takes bfloat16 through float32")
    if autocast and dtype == "wide":
        pytest.skip("autocast leaves float64 alone")
    layer = a_layer(dtype=dtype, **options)
    for tokens in (2, 40):  # with and without a projected dY of its own
        x = an_input(DTYPES[dtype][0], tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = everything(layer, x)
            assert layer._plan is not None
            again = everything(layer, x)
            with monkeypatch.context() as patch:
                patch.setattr(linear, "make_plan", lambda *_: None)
                layer.__dict__["_plan"] = None
                expected = everything(layer, x)
        for numbers in zip(found, again, expected, strict=True):
            assert numbers[0].dtype == numbers[2].dtype
            assert torch.equal(numbers[0], numbers[2]) and torch.equal(numbers[1], numbers[2])


def test_a_plan_made_under_autocast_is_exact_outside() -> None:
    if not cpu.multiplies(torch.bfloat16):
        pytest.skip("this CPU takes bfloat16 through float32")
    layer, x = a_layer(dtype="mixed"), an_input(torch.bfloat16)
    expected = everything(layer, x)
    layer.__dict__["_plan"] = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    kept = layer._plan
    assert kept is not None
    assert all(map(torch.equal, everything(layer, x), expected))
    assert layer._plan is kept


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "x"])
def test_only_the_gradients_that_are_asked_for(frozen: str) -> None:
    layer, _, x = planned()
    if frozen != "x":
        getattr(layer, frozen)["default"].weight.requires_grad_(False)
        x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert layer._plan is not None
    have = {
        name
        for name in ("lora_A", "lora_B")
        if getattr(layer, name)["default"].weight.grad is not None
    }
    assert have == {"lora_A", "lora_B"} - {frozen}
    assert (x.grad is None) == (frozen == "x")


def test_a_frozen_A_keeps_no_input() -> None:
    layer, _, x = planned()
    layer.lora_A["default"].weight.requires_grad_(False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert kept and all(
        t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in kept
    )


# --- every change is noticed


def rebind(path: str, value: Any) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            layer = (
                layer[owner] if isinstance(layer, (nn.ModuleDict, dict)) else getattr(layer, owner)
            )
        if isinstance(layer, (nn.ModuleDict, dict)):
            layer[name] = value
        else:
            setattr(layer, name, value)

    return change


def in_half(path: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        for owner in path.split("."):
            layer = layer[owner] if isinstance(layer, nn.ModuleDict) else getattr(layer, owner)
        layer.data = layer.data[: len(layer) // 2].clone()

    return change


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape), requires_grad=False)


HOOK = lambda *_: None  # noqa: E731
CHANGES: dict[str, Callable[[Any], Any]] = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "merged in name": lambda layer: layer.merged_adapters.append("default"),
    "list of merged": rebind("merged_adapters", ["default"]),
    "another adapter": rebind("_active_adapter", ["other"]),
    "another adapter's name": rebind("_active_adapter", "other"),
    "two adapters": lambda layer: layer._active_adapter.append("other"),
    "scaling": lambda layer: layer.scale_layer(0.5),
    "scalings": lambda layer: rebind("scaling", dict(layer.scaling))(layer),
    "variant": lambda layer: layer.lora_variant.update(default=object()),
    "base layer": rebind("base_layer", nn.Linear(K, N)),
    "weight": rebind("base_layer.weight", parameter(N, K)),
    "weight of another shape": in_half("base_layer.weight"),
    "bias": rebind("base_layer.bias", parameter(N)),
    "trained weight": lambda layer: layer.base_layer.weight.requires_grad_(),
    "trained bias": lambda layer: layer.base_layer.bias.requires_grad_(),
    "A": rebind("lora_A.default.weight", parameter(4, K)),
    "A of another shape": in_half("lora_A.default.weight"),
    "B": rebind("lora_B.default.weight", parameter(N, 4)),
    "B of another shape": in_half("lora_B.default.weight"),
    "bias of B": rebind("lora_B.default.bias", parameter(N)),
    "module A": rebind("lora_A.default", nn.Linear(K, 4, bias=False)),
    "module B": rebind("lora_B.default", nn.Linear(4, N, bias=False)),
    "modules A": rebind("lora_A", nn.ModuleDict({"default": nn.Linear(K, 4)})),
    "module of dropout": rebind("lora_dropout.default", nn.Dropout(0.5)),
    "dropout in evaluation": lambda layer: layer.eval(),
    "rate of dropout": rebind("lora_dropout.default.p", 0.9),
    "forward of the base": rebind("base_layer.forward", HOOK),
    "forward of A": rebind("lora_A.default.forward", HOOK),
    "view of the weight": lambda layer: layer.base_layer.__dict__.update(weight=torch.ones(N, K)),
    "view of B": lambda layer: layer.lora_B["default"].__dict__.update(weight=torch.ones(N, 4)),
    "hook": lambda layer: layer.base_layer.register_forward_hook(HOOK),
    "hook before": lambda layer: layer.lora_A["default"].register_forward_pre_hook(HOOK),
    "hook of the gradient": lambda layer: layer.lora_B["default"].register_full_backward_hook(HOOK),
    "basis": lambda layer: rebind("write_basis", layer.write_basis.clone())(layer),
    "basis of another shape": in_half("write_basis"),
    "mode": rebind("project", "weights"),
    "closed adapters": rebind("closed_adapters", frozenset()),
    "new adapters": rebind("new_adapters", frozenset({"default"})),
    "backend": rebind("backend", "reference"),
    "parameters": lambda layer: layer.base_layer.__dict__.update(
        _parameters=dict(layer.base_layer._parameters)
    ),
    "modules of A": lambda layer: layer.lora_A.__dict__.update(
        _modules=dict(layer.lora_A._modules)
    ),
    "hooks": rebind("base_layer._forward_hooks", {1: HOOK}),
    "class of the base": rebind("base_layer.__class__", type("Other", (nn.Linear,), {})),
    "class of A": rebind("lora_A.default.__class__", type("Other", (nn.Linear,), {})),
    "class of dropout": rebind("lora_dropout.default.__class__", type("Other", (nn.Dropout,), {})),
    "parametrized": lambda layer: nn.utils.parametrizations.weight_norm(layer.lora_A["default"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_a_layer_is_noticed(name: str) -> None:
    layer, kept, x = planned(bias=True, lora_dropout=0.5)
    CHANGES[name](layer)
    assert kept.run(layer, x, None) is None


def test_what_is_read_at_each_call_may_change() -> None:
    """Values and dtypes need no guard; a plan that had kept a copy would give the old numbers."""
    layer, kept, x = planned(closed=False)
    for owner in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        before = layer(x)
        owner.weight.data = owner.weight.data * 2  # another storage, past the version counter
        assert layer._plan is kept
        assert not torch.allclose(layer(x), before)
    before = layer(x)
    layer.base_layer.weight.data.mul_(2.0)
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize(
    "x",
    [
        an_input(torch.float64),
        an_input(torch.bfloat16),
        an_input()[..., :-1],
        torch.tensor(1.0),
        an_input().to("meta"),
        an_input().as_subclass(type("Other", (Tensor,), {})),
        torch.ones(2, K, dtype=torch.long),
        an_input().to_sparse(),
    ],
    ids=["float64", "bfloat16", "narrow", "scalar", "meta", "subclass", "integer", "sparse"],
)
def test_another_kind_of_input_is_noticed(x: Tensor) -> None:
    layer, kept, _ = planned()
    assert kept.run(layer, x, None) is None


@pytest.mark.parametrize("what", ["vmap", "dual numbers", "flops", "trace", "export"])
def test_whatever_transforms_operations_is_noticed(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, kept, x = planned()
    found = []

    def call(x: Tensor) -> Tensor:
        plain = torch.empty(T, K)
        found.append(kept.run(layer, plain, None))
        return x

    if what == "vmap":
        vmap(call)(x)
    elif what == "dual numbers":
        with forward_ad.dual_level():
            call(x)
    elif what == "flops":
        with FlopCounterMode(display=False):
            call(x)
    elif what == "trace":
        torch.jit.trace(call, x[0], check_trace=False)
    else:
        monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
        call(x)
    assert found[0] is None


def test_extra_arguments_go_the_whole_way() -> None:
    layer, _, x = planned()
    with pytest.raises(ValueError, match="adapter_names"):
        layer(x, adapter_names=["default"])


def test_long_calls_are_left_to_kernels_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "measured_on", lambda where: True)
    monkeypatch.setattr(registry, "least_tokens", lambda *widths: 2 * T)
    layer = a_layer()
    layer(an_input(tokens=T))  # 2 T tokens
    assert layer._plan is None
    layer(an_input(tokens=T - 1))
    assert layer._plan is not None
    assert layer._plan.run(layer, an_input(tokens=T), None) is None


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_backend_that_is_asked_for_is_taken(backend: str) -> None:
    layer = a_layer()
    layer.backend = backend
    assert plan.make_plan(layer, an_input(), "default") is None


def test_a_cpu_without_bfloat16_takes_the_way_through_float32(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: dtype.itemsize > 2)
    layer = a_layer(dtype="bfloat16")
    x = an_input(torch.bfloat16)
    exact = a_layer()
    for theirs, ours in zip(exact.parameters(), layer.parameters(), strict=True):
        theirs.data.copy_(ours)
    wide = exact(x.float())
    assert torch.equal(layer(x), wide.to(torch.bfloat16))
    if kind == "compiled":
        assert layer._plan.run(layer, x, None) is None


# --- what was built, and for which torch


def test_a_library_for_another_torch_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "__version__", "3.1.4")
    monkeypatch.setattr(plan, "_FOLDER", tmp_path)
    assert find_compiled() == "not built"
    (tmp_path / "_call_2_99.cpython-311-x86_64-linux-gnu.so").touch()
    assert find_compiled() == "built for torch 2.99, and torch is 3.1.4"


def test_a_broken_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "__version__", "3.1.4")
    monkeypatch.setattr(plan, "_FOLDER", tmp_path)
    monkeypatch.setattr("grasp_kernels.__path__", [str(tmp_path)])
    (tmp_path / f"_call_3_1{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    assert "built for torch 3.1, but" in find_compiled()
