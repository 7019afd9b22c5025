"""Corners in which people meet a peft model, each held against stock peft.

The layers have to be what peft's are: found by peft under their names, reached by every way in
which peft makes an adapter, transformed, exported, counted and copied by torch, as exact, and no
slower where a CPU has no instructions for a dtype.
"""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import grasp_kernels as gk
from grasp_kernels import cpu
from tests.helpers.models import (
    ALL_LINEAR,
    a_subspace,
    bases_of,
    randomise_adapter,
    tiny_model,
    tokens,
)
from tests.helpers.oracle import budget, orthonormal, relative_error

K, H, N = 16, 32, 8


def inputs(T: int = 5) -> Tensor:
    return torch.randn(T, K, generator=torch.Generator().manual_seed(9))


def a_basis(width: int, k: int = 2) -> Tensor:
    return orthonormal(width, k, torch.Generator().manual_seed(width))


def two_layers(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, H), nn.Tanh(), nn.Linear(H, N))
    options = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False, **options}
    return get_peft_model(base, LoraConfig(**options)).eval()


def ours(project: bool = False, closed: bool = True, **options: Any) -> PeftModel:
    """The same on our layers, the last of them with a basis with `project`."""
    model = two_layers(**options)
    gk.apply_grasp(model)
    if project:
        last = model.base_model.model[2]
        last.set_projection(a_basis(N), "residual", closed, "auto")
    return model


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Two computations in float32, of which each may round as sums of H numbers do."""
    assert relative_error(found, expected) <= 2 * budget(0.0, torch.float32, H)


# --- the names that peft asks for


def moe_model() -> PeftModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))
    return get_peft_model(base, moe_config()).eval()


def moe_config() -> LoraConfig:
    options: Any = {"init_lora_weights": False, "lora_dropout": 0.0}
    return LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], **options
    )


def test_a_second_adapter_on_fused_experts() -> None:
    results = []
    for replaces in (False, True):
        model = moe_model()
        if replaces:
            gk.apply_grasp(model)
        torch.manual_seed(1)
        model.add_adapter("other", moe_config())
        model.set_adapter("other")
        if replaces:
            gk.apply_grasp(model)
        wrappers = sorted(n for n, m in model.named_modules() if isinstance(m, ParamWrapper))
        with torch.no_grad():
            results.append((wrappers, model(input_ids=tokens()).logits, list(model.state_dict())))
    assert results[1][0] == results[0][0]
    assert results[1][2] == results[0][2]
    assert_close(results[1][1], results[0][1])


def test_layers_carry_the_names_of_peft_and_are_printed_with_ours() -> None:
    model = moe_model()
    gk.apply_grasp(model)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            assert type(layer).__name__ in ("Linear", "ParamWrapper")
            assert str(layer).startswith(f"lora.{type(layer).__qualname__}(")
    assert {type(m).__qualname__ for m in model.modules() if isinstance(m, LoraLayer)} == {
        "GraspLoRALinear",
        "GraspLoRAExperts",
    }


# --- the ways in which peft makes an adapter: one call of apply_grasp after any of them


def config(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM", **options)


def by_get_peft_model(folder: Path) -> nn.Module:
    return get_peft_model(tiny_model(), config())


def by_from_pretrained(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(tiny_model(), folder, is_trainable=True)


def by_load_adapter(folder: Path) -> nn.Module:
    model = get_peft_model(tiny_model(), config())
    model.load_adapter(folder, "loaded", is_trainable=True)
    model.set_adapter("loaded")
    return model


def by_add_adapter(folder: Path) -> nn.Module:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", config())
    model.set_adapter("other")
    return model


def by_inject(folder: Path) -> nn.Module:
    return inject_adapter_in_model(config(), tiny_model())


def by_transformers_add(folder: Path) -> nn.Module:
    model = tiny_model()
    try:
        model.add_adapter(config())
    except ValueError as error:
        pytest.skip(str(error))  # transformers asks for a later peft
    return model


def by_transformers_load(folder: Path) -> nn.Module:
    model = tiny_model()
    model.load_adapter(str(folder), is_trainable=True)
    return model


WAYS = (
    by_get_peft_model,
    by_from_pretrained,
    by_load_adapter,
    by_add_adapter,
    by_inject,
    by_transformers_add,
    by_transformers_load,
)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_an_adapter_leads_to_our_layers(
    way: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    saved = get_peft_model(tiny_model(), config())
    subspace = a_subspace(saved)
    saved.save_pretrained(tmp_path)
    model = way(tmp_path).double()
    randomise_adapter(model)
    results = []
    for replaced in (False, True):
        if replaced:
            report = gk.apply_grasp(model)
            assert len(report.replaced) == 7 * 3
            assert not report.fallbacks
        model.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({name: gradient.clone() for name, gradient in trained.items()})
    stock, found = results
    assert found.keys() == stock.keys() != set()
    for name, gradient in stock.items():
        assert relative_error(found[name], gradient) <= 1e-10, name
    report = gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    assert len(report.projected) == 2 * 3
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    along = [
        (V.double().mT @ p.grad).norm() / p.grad.norm()
        for name, p in model.named_parameters()
        for site, V in bases_of(model, subspace).items()
        if f"{site}.lora_B" in name and p.grad is not None
    ]
    assert len(along) == 2 * 3
    assert max(along) <= 1e-6  # the basis is float32


# --- what torch does with a call


def per_sample_gradients(model: nn.Module) -> Tensor:
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, given, (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(trained, inputs())
    return torch.cat([gradient.flatten() for gradient in found.values()])


def an_ensemble(model: nn.Module) -> Tensor:
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    stacked = {n: torch.stack([p, 2 * p]) for n, p in trained.items()}
    x = inputs()
    return vmap(lambda given: functional_call(model, given, (x,)))(stacked)


def forward_mode(model: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(inputs(), torch.ones(5, K))
        return forward_ad.unpack_dual(model(x)).tangent


TRANSFORMS: dict[str, Callable[[Any], Tensor]] = {
    "per sample": per_sample_gradients,
    "ensemble": an_ensemble,
    "vmap": lambda model: vmap(model)(torch.stack([inputs(), 2 * inputs()])),
    "grad": lambda model: grad(lambda x: model(x).square().sum())(inputs()),
    "jvp": lambda model: jvp(model, (inputs(),), (torch.ones(5, K),))[1],
    "forward mode": forward_mode,
    "jacrev": lambda model: jacrev(model)(inputs()[0]),
    "hessian": lambda model: hessian(lambda x: model(x).square().sum())(inputs()[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("several", [False, True])
def test_transforms_are_those_of_stock_peft(name: str, several: bool) -> None:
    results = []
    for model in (two_layers(), ours()):
        if several:
            torch.manual_seed(3)
            model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
            model.base_model.set_adapter(["default", "other"])
        results.append(TRANSFORMS[name](model))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_transforms_see_the_projected_gradient(closed: bool, lora_bias: bool) -> None:
    """The sum over the samples is what the operator's own backward finds."""
    model = ours(project=True, closed=closed, lora_bias=lora_bias)
    found = per_sample_gradients(model).view(-1)
    model(inputs()).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = [5 * p.numel() for p in trained]
    for part, parameter in zip(found.split(sizes), trained, strict=True):
        assert_close(part.view(5, *parameter.shape).sum(0), parameter.grad)
    with torch.no_grad():
        assert_close(vmap(model)(inputs()[:, None])[:, 0], model(inputs()))


@pytest.mark.parametrize("closed", [False, True])
def test_derivatives_along_a_direction_are_projected_as_gradients_are(closed: bool) -> None:
    """`⟨u, J v⟩ = ⟨Jᵀ u, v⟩`, with the `Jᵀ u` of the operator's own backward."""
    model = ours(project=True, closed=closed).double()
    x, v = inputs().double().requires_grad_(), torch.ones(5, K, dtype=torch.float64)
    y = model(x)
    u = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(y, x, u)
    x = x.detach()
    for tangent in (jvp(model, (x,), (v,))[1], jvp(vmap(model), (x,), (v,))[1]):
        torch.testing.assert_close((u * tangent).sum(), (gradient * v).sum())


@pytest.mark.slow
@pytest.mark.parametrize("project", [False, True])
def test_compiled_transforms(project: bool) -> None:
    model = ours(project=project)
    torch._dynamo.reset()
    gradients = vmap(grad(lambda x: model(x[None]).square().sum()))
    run = torch.compile(gradients, backend="eager")
    assert_close(run(inputs()), gradients(inputs()))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("project", [False, True])
def test_exports_are_operations_of_torch(strict: bool, project: bool) -> None:
    model = ours(project=project)
    program = torch.export.export(model, (inputs(),), strict=strict)
    assert "grasp_kernels" not in str(program.graph)
    with torch.no_grad():
        assert_close(program.module()(inputs()), model(inputs()))
        assert_close(torch.jit.trace(model, inputs())(inputs()), model(inputs()))


class Marked(Tensor):
    """A tensor of a class of its own, as libraries of images and masks have them."""


def test_tensors_of_a_class_of_their_own_stay_so() -> None:
    for project in (False, True):
        model = ours(project=project)
        found = model(inputs().as_subclass(Marked))
        assert type(found) is Marked
        assert_close(found.as_subclass(Tensor), model(inputs()))
    nested = torch.nested.nested_tensor([inputs()[:2], inputs()[2:]], layout=torch.jagged)
    assert_close(ours()(nested).values(), two_layers()(inputs()))


def test_tensors_without_data() -> None:
    for project in (False, True):
        model = ours(project=project)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(inputs())).shape == (5, N)
        model.to("meta")(torch.empty(5, K, device="meta")).sum().backward()
        shapes = {n: p.grad.shape for n, p in model.named_parameters() if p.grad is not None}
        assert shapes == {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    x, W, A, B = (torch.empty(*s, device="meta") for s in ((5, K), (N, K), (4, K), (N, 4)))
    y = gk.lora_linear(x, W, None, A.requires_grad_(), B, 1.0, dropout_p=0.5)
    y.sum().backward()
    assert (y.shape, A.grad.shape) == ((5, N), (4, K))


def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("of_x", [False, True])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "nothing"])
def test_flops_are_counted(of_x: bool, frozen: str) -> None:
    models = two_layers(), ours()
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and frozen not in name)
    stock, found = (flops(model, inputs().requires_grad_(of_x)) for model in models)
    assert found == stock > 0
    if frozen == "nothing":  # at least D = dY V and D Vᵀ of the writer
        projected = flops(ours(project=True), inputs().requires_grad_(of_x))
        assert projected - stock >= 2 * 2 * 5 * 2 * N


def test_what_selective_checkpointing_keeps_is_chosen_by_operation() -> None:
    kept: list[str] = []

    def policy(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept.append(str(operation))
        wide = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if wide else CheckpointPolicy.PREFER_RECOMPUTE

    results = []
    for model in (two_layers(), ours()):
        kept.clear()
        x = inputs().requires_grad_()
        contexts = partial(create_selective_checkpoint_contexts, policy)
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        y.square().sum().backward()
        results.append((x.grad, list(kept)))
    assert_close(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]


def test_saved_tensors_go_through_hooks() -> None:
    results = []
    for model in (ours(project=True), ours(project=True)):
        with torch.autograd.graph.save_on_cpu() if results else torch.enable_grad():
            y = model(inputs())
        y.square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *results))


def test_copies_and_pickles() -> None:
    model = ours(project=True)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stored, weights_only=False),
    ):
        assert torch.equal(other(inputs()), model(inputs()))
        assert {type(m) for m in other.modules()} == {type(m) for m in model.modules()}


# --- scalings that are tensors


def scaled(model: PeftModel, scale: Tensor) -> tuple[Tensor, list[Tensor]]:
    for index in (0, 2):
        model.base_model.model[index].scaling["default"] = scale
    y = model(inputs())
    wanted = [p for p in (scale, *model.parameters()) if p.requires_grad]
    return y, list(torch.autograd.grad(y.square().sum(), wanted))


@pytest.mark.parametrize(
    "scale",
    [torch.tensor(0.7), torch.tensor(0.7, requires_grad=True), torch.arange(5.0)[:, None]],
    ids=["constant", "learnable", "per example"],
)
def test_a_tensor_as_scaling(scale: Tensor) -> None:
    model = ours()
    with pytest.warns(UserWarning, match="not accelerated: the scaling is a tensor"):
        (found, ours_gradients) = scaled(model, scale)
    expected, gradients = scaled(two_layers(), scale)
    assert_close(found, expected)
    for one, other in zip(ours_gradients, gradients, strict=True):
        assert_close(one, other)


def test_a_compiled_model_is_not_compiled_again_by_a_hotswap(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "other")):
        two_layers(lora_alpha=8 * (seed + 1)).save_pretrained(tmp_path / name)
    torch._dynamo.reset()
    base = two_layers().unload()
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one").eval()
    prepare_model_for_compiled_hotswap(model)
    gk.apply_grasp(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(inputs())
        hotswap_adapter(compiled, tmp_path / "other", adapter_name="default")
        expected = PeftModel.from_pretrained(base, tmp_path / "other").eval()(inputs())
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(compiled(inputs()), expected)


# --- precision, and CPUs without instructions for a dtype


def one_layer(dtype: torch.dtype, lora_bias: bool, rank: int = 16) -> PeftModel:
    torch.manual_seed(0)
    options: Any = {"init_lora_weights": False, "lora_bias": lora_bias}
    base = nn.Sequential(nn.Linear(48, 40)).to(dtype)
    return get_peft_model(base, LoraConfig(r=rank, target_modules=["0"], **options))


def results_of(model: PeftModel, wide: bool, dtype: torch.dtype) -> list[Tensor]:
    """Y and all gradients for inputs that are exact in `dtype`."""
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(65, size, generator=g).to(dtype) for size in (48, 40))
    if wide:
        model, x, dy = copy.deepcopy(model).double(), x.double(), dy.double()
    x.requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def a_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has instructions for half precision, and one that has not."""
    fast = request.param
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: fast or dtype.itemsize > 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_float32_adapter_is_as_exact_as_in_peft(
    dtype: torch.dtype, lora_bias: bool, backend: str, a_cpu: None
) -> None:
    """Outside of autocast its products are float32, and dA, dB are five digits more exact."""
    model = one_layer(dtype, lora_bias)
    oracle, stock = results_of(model, True, dtype), results_of(model, False, dtype)
    gk.apply_grasp(model, gk.GraspConfig(backend=backend))
    for i, (one, theirs, right) in enumerate(
        zip(results_of(model, False, dtype), stock, oracle, strict=True)
    ):
        assert one.dtype == theirs.dtype
        error = relative_error(one, right)
        unit = torch.finfo(dtype if i < 2 else torch.float32).eps
        assert error <= max(1.5 * relative_error(theirs, right), unit), i


def test_a_float32_adapter_with_dropout_is_exact(a_cpu: None) -> None:
    """`⟨dB, B⟩ = s ⟨dY, S B⟩`: with one mask in forward and backward, and unrounded."""
    layer = gk.GraspLoRALinear.from_linear(nn.Linear(48, 40), r=4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.base_layer.bfloat16()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(65, size, generator=g).bfloat16() for size in (48, 40))
    dA, dB = torch.autograd.grad(layer(x), [A, B], dy)
    torch.testing.assert_close((dA * A).sum(), (dB * B).sum(), rtol=1e-4, atol=0.0)


def test_half_precision_on_a_cpu_without_its_instructions(monkeypatch: Any) -> None:
    """The same within the budget of stock peft, with bases and dropout, by float32 products."""
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: dtype.itemsize > 2)
    for dtype in (torch.bfloat16, torch.float16):
        model = one_layer(dtype, True).to(dtype)
        oracle, stock = results_of(model, True, dtype), results_of(model, False, dtype)
        gk.apply_grasp(model)
        for one, theirs, right in zip(results_of(model, False, dtype), stock, oracle, strict=True):
            assert one.dtype == dtype
            limit = budget(relative_error(theirs, right), dtype, 65)
            assert relative_error(one, right) <= limit


def test_models_are_loaded_in_float32_there(monkeypatch: Any) -> None:
    model = tiny_model().bfloat16()
    assert cpu.in_fast_dtype(tiny_model()).dtype == torch.float32
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: dtype.itemsize > 2)
    with pytest.warns(UserWarning, match=r"no instructions for products in bfloat16.*in float32"):
        assert cpu.in_fast_dtype(model).dtype == torch.float32


def test_such_a_cpu_is_known_by_what_onednn_says() -> None:
    assert cpu.multiplies(torch.float32)
    if torch.backends.mkldnn.is_available():
        assert cpu.multiplies(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
