"""A gated MLP that keeps no product: the same bits, fewer bytes, and whole where it cannot."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel

import grasp_kernels as gk
from benchmarks.kept import kept
from grasp_kernels.layers import gated, plan
from grasp_kernels.layers.gated import GatedMLP
from grasp_kernels.ops import gated as ops_gated
from grasp_kernels.ops.gpu import gated as kernels
from tests.helpers.models import ALL_LINEAR, tiny_model
from tests.helpers.oracle import orthonormal

D, I, T = 32, 96, 11
COMPILED = plan.compiled()


@pytest.fixture(params=["compiled", "python"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated, "_LEAST_ELEMENTS", 1)
    if request.param == "python":
        monkeypatch.setattr(plan, "compiled", lambda: "not asked for")
    elif isinstance(COMPILED, str):
        pytest.skip(f"the calls of layers are not compiled: {COMPILED}")


def an_mlp(
    dtype: torch.dtype = torch.float32,
    act: str = "silu",
    backend: str = "auto",
    Q: int = 2,
    targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
    **options: Any,
) -> nn.Module:
    """A module with one MLP at `mlp`, on our layers."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=D, intermediate_size=I, hidden_act=act)
    model: Any = get_peft_model(
        nn.ModuleDict({"mlp": LlamaMLP(config)}).to(dtype),
        LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options),
        autocast_adapter_dtype=False,
    )
    gk.layers.replacement.replace_lora_layers(model, backend=backend)
    mlp: nn.Module = model.base_model.model["mlp"]
    if Q and "down_proj" in targets:
        V = orthonormal(D, Q, torch.Generator().manual_seed(1))
        mlp.down_proj.set_projection(V, "residual", True, backend)
    return mlp


def an_input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, T, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def run(mlp: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """y, dx and the gradients of the adapters, which are dropped."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = mlp(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
    module.zero_grad()
    return [t for t in found if t is not None]


def in_stock(mlp: nn.Module, x: Tensor) -> list[Tensor]:
    """The same with the forward of transformers, on our layers."""
    stock: Any = type(mlp).stock
    return run(lambda given: stock.forward(mlp, given), mlp, x)


def assert_same(found: list[Tensor], meant: list[Tensor]) -> None:
    assert len(found) == len(meant) > 3
    assert all(map(torch.equal, found, meant))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("act", ["silu", "swish", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.5},
        {"lora_bias": True},
        {"targets": ("down_proj",)},
        {"targets": ("up_proj", "down_proj"), "Q": 0},
    ],
    ids=str,
)
def test_the_same_bits(backend: str, act: str, dtype: torch.dtype, options: Any) -> None:
    mlp, x = an_mlp(dtype, act, backend, **options), an_input(dtype)
    assert isinstance(mlp, GatedMLP)
    assert_same(run(mlp, mlp, x), in_stock(mlp, x))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_the_same_bits_under_autocast_and_with_a_wider_adapter(adapter: torch.dtype) -> None:
    mlp, x = an_mlp(torch.bfloat16), an_input(torch.bfloat16)
    for name, parameter in mlp.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    assert_same(run(mlp, mlp, x), in_stock(mlp, x))
    mlp = an_mlp()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(mlp, mlp, an_input()), in_stock(mlp, an_input()))


def test_kernels_take_the_place_of_library_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the product, its gradients and its second computation, whoever calls the layer."""
    mlp, x = an_mlp(), an_input()
    meant, calls = in_stock(mlp, x), []
    for name in ("product", "gradients"):
        run_kernel = getattr(kernels, name)

        def counted(*given: Any, name: str = name, run: Any = run_kernel) -> Any:
            calls.append(name)
            return run(*given)

        monkeypatch.setattr(kernels, name, counted)
    for module in (gated, ops_gated):
        monkeypatch.setattr(module, "kernels_for", lambda source: kernels)
    # As for the long calls of a GPU, which have no plan.
    monkeypatch.setattr("grasp_kernels.layers.linear.make_plan", lambda *_: None)
    mlp.down_proj.__dict__["_plan"] = None
    for found, exact in zip(run(mlp, mlp, x), meant, strict=True):
        torch.testing.assert_close(found, exact)
    assert calls == ["product", "product", "gradients"]


@pytest.mark.parametrize("frozen_A", [True, False])
def test_the_product_is_not_kept(frozen_A: bool) -> None:
    mlp, x = an_mlp(), an_input().requires_grad_()
    if frozen_A:
        mlp.down_proj.lora_A.requires_grad_(False)
    ours = kept(lambda: mlp(x), mlp)
    theirs = kept(lambda: LlamaMLP.forward(mlp, x), mlp)
    of_a_product = 2 * T * I * 4
    assert theirs - ours == (1 if frozen_A else 2) * of_a_product


@pytest.mark.parametrize(
    ("dtype", "dropout", "most"),
    [
        (torch.float32, 0.0, 0.67),
        (torch.float32, 0.05, 0.41),
        (torch.bfloat16, 0.0, 0.71),
        (torch.bfloat16, 0.05, 0.45),
    ],
)
def test_bytes_that_a_decoder_layer_keeps(dtype: torch.dtype, dropout: float, most: float) -> None:
    """Of stock peft's, at an eighth of the widths of Llama-3.1-8B."""
    found = {}
    for ours in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=512, intermediate_size=1792, num_hidden_layers=1, vocab_size=8,
            num_attention_heads=4, num_key_value_heads=1, head_dim=128,
        )  # fmt: skip
        model: Any = LlamaModel(config).to(dtype)
        model.norm = nn.Identity()
        options = LoraConfig(r=4, lora_dropout=dropout, target_modules=list(ALL_LINEAR))
        model = get_peft_model(model, options, autocast_adapter_dtype=False)
        if ours:
            gk.layers.replacement.replace_lora_layers(model)
        x = torch.randn(1, 64, 512, dtype=dtype, requires_grad=True)
        found[ours] = kept(lambda m=model, x=x: m(inputs_embeds=x, use_cache=False), model)
    assert found[True] <= most * found[False]


def test_a_small_product_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = an_mlp(), an_input().requires_grad_()
    monkeypatch.setattr(gated, "_LEAST_ELEMENTS", 2 * T * I + 1)
    assert kept(lambda: mlp(x), mlp) == kept(lambda: LlamaMLP.forward(mlp, x), mlp)
    assert_same(run(mlp, mlp, an_input()), in_stock(mlp, an_input()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    mlp, x = an_mlp(lora_dropout=0.5), an_input()
    found = run(lambda given: checkpoint(mlp, given, use_reentrant=reentrant), mlp, x)
    assert_same(found, in_stock(mlp, x))


def test_tensors_are_offloaded() -> None:
    mlp, x = an_mlp(), an_input()
    with save_on_cpu():
        assert_same(run(mlp, mlp, x), in_stock(mlp, x))


def test_a_graph_is_kept_and_not_differentiated_twice() -> None:
    mlp, x = an_mlp(), an_input().requires_grad_()
    y = mlp(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x, retain_graph=True)[0], first)
    (again,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        again.sum().backward()


def test_no_gradient_is_asked_for() -> None:
    mlp, x = an_mlp(), an_input()
    meant = LlamaMLP.forward(mlp, x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(mlp(x), meant)


def test_hooks_see_and_change_the_product() -> None:
    mlp, x = an_mlp(), an_input()
    meant = in_stock(mlp, x)
    seen = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert_same(run(mlp, mlp, x), meant)
    handle.remove()
    every = register_module_forward_pre_hook(
        lambda module, given: seen.append(given[0]) if module is mlp.down_proj else None
    )
    assert_same(run(mlp, mlp, x), meant)
    every.remove()
    assert [tuple(product.shape) for product in seen] == [(2, T, I)] * 2
    handle = mlp.act_fn.register_forward_hook(lambda *given: given[2] * 0)
    assert not mlp(x).any()
    handle.remove()
    assert_same(run(mlp, mlp, x), meant)


def test_two_adapters_and_none() -> None:
    """Whatever `down_proj` computes, it gets the product."""
    mlp, x = an_mlp(), an_input()
    down: Any = mlp.down_proj
    down.enable_adapters(False)
    assert_same(run(mlp, mlp, x), in_stock(mlp, x))
    down.enable_adapters(True)
    down.merge()
    assert_same(run(mlp, mlp, x), in_stock(mlp, x))


def test_compiled_code_has_one_graph() -> None:
    mlp, x = an_mlp(), an_input()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    for found, meant in zip(run(compiled, mlp, x), in_stock(mlp, x), strict=True):
        torch.testing.assert_close(found, meant)


@pytest.mark.parametrize("config", [Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config])
def test_families_with_the_formula(config: type[PreTrainedConfig]) -> None:
    options = {"head_dim": 8} if config is Gemma2Config else {}
    model: Any = get_peft_model(
        tiny_model(config, **options), LoraConfig(target_modules=list(ALL_LINEAR))
    )
    stock = {name: type(module) for name, module in model.named_modules()}
    report = gk.apply_grasp(model)
    assert report.gated == [f"model.layers.{i}.mlp" for i in range(3)]
    assert re.search("MLPs that keep no product .* 3\n", str(report))
    for name, module in model.named_modules():
        if name.endswith("mlp"):
            assert isinstance(module, GatedMLP)
            assert isinstance(module, stock[name])
            assert type(module).__name__ == stock[name].__name__
    gk.remove_grasp(model)
    assert {name: type(module) for name, module in model.named_modules()} == stock


def test_another_formula_stays() -> None:
    model: Any = get_peft_model(
        tiny_model(Phi3Config, pad_token_id=0), LoraConfig(target_modules=["down_proj"])
    )
    assert gk.apply_grasp(model).gated == []
    mlp = an_mlp()
    gk.layers.replacement.restore_lora_layers(mlp)

    class Other(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    mlp.__class__ = Other
    assert gated.adopt_gated(mlp) == []


def twice(self: Any, x: Tensor) -> Tensor:
    """Llama's MLP without `act_fn`, as kernel libraries put it in its place."""
    y: Tensor = 2 * self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
    return y


def test_a_forward_that_somebody_replaced_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = an_mlp(), an_input()
    once = mlp(x)
    monkeypatch.setattr(LlamaMLP, "forward", twice)
    assert torch.equal(mlp(x), 2 * once)
    gk.layers.replacement.restore_lora_layers(mlp)
    del mlp.act_fn
    assert gated.adopt_gated(mlp) == []
    torch.testing.assert_close(mlp(x), 2 * once)


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_many_gradients_at_once(act: str) -> None:
    """As `torch.autograd.functional.jacobian(..., vectorize=True)` asks for them."""
    mlp, x = an_mlp(act=act), an_input()[0, :2].requires_grad_()
    y = mlp(x)
    every = torch.eye(y.numel()).view(-1, *y.shape)
    (found,) = torch.autograd.grad(y, x, every, retain_graph=True, is_grads_batched=True)
    for dy, dx in zip(every, found, strict=True):
        (meant,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        torch.testing.assert_close(dx, meant)


def test_copies_and_pickles() -> None:
    mlp, x = an_mlp(), an_input()
    meant = run(mlp, mlp, x)
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert isinstance(other, GatedMLP)
        assert_same(run(other, other, x), meant)
