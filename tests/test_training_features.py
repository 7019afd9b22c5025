"""What people train with, each feature held against stock peft over 20 steps.

Stock peft and GraspLoRALinear start from the same weights and see the same data; the budget is the
error of stock peft against the same training in float64. Here are also the calls that come between
two steps, and what says that something is not accelerated. Single steps, the stream's gradient,
closure under AdamW and checkpointing of one step are in test_replacement.py, a run that is killed
in test_resume.py.
"""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from models import ALL_LINEAR, SIZES, randomise_adapter, tiny_model, tokens
from peft import KasaConfig, LoraConfig, PeftModel, VeloraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from test_replacement import a_subspace, assert_same_gradients, logits, loss_and_gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Qwen2Config, Trainer, TrainingArguments

import grasp_kernels as gk
from grasp_kernels.ops.lora_linear.aten import kept
from grasp_kernels.ops.lora_linear.dropout import draw_seed
from grasp_kernels.testing import RATIO, orthonormal

STEPS = 20
WRITERS = ("o_proj", "down_proj")
SOME = ("q_proj", *WRITERS)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def forgetful_compiler() -> Iterator[None]:
    """A length that another test has compiled would make the next one dynamic, and slow."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class SameMask(nn.Module):
    """Dropout as torch does it, of the elements that the operator's own dropout drops."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        rows = x.reshape(-1, x.shape[-1])
        mask = kept(rows, draw_seed(rows), self.p).view(x.shape)
        return x * mask / (1.0 - self.p)


def lora_model(base: dict[str, Any] | None = None, **options: Any) -> PeftModel:
    """A tiny Qwen2 of two blocks (its q, k and v have biases) whose adapter looks trained."""
    # r = 16: see test_without_a_subspace_it_is_stock_peft
    config = {"r": 16, "lora_alpha": 16, "target_modules": list(ALL_LINEAR), **options}
    model = get_peft_model(qwen(**(base or {})), LoraConfig(**config))
    if "init_lora_weights" not in options:
        randomise_adapter(model)
    return model


def qwen(**options: Any) -> PreTrainedModel:
    model = tiny_model(Qwen2Config, **options)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


def with_same_masks(model: nn.Module) -> nn.Module:
    """A stock model that drops what the operator would drop."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[name] = SameMask(dropout.p)
    return model


@dataclass
class Trace:
    """Of a training: the loss and all gradients of every step, and the scales of a GradScaler."""

    losses: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


def batches(count: int, lengths: int = 4) -> Iterator[Tensor]:
    """Token ids `[2, T]` of four batches, again and again, each of its own length if 4."""
    for i in range(count):
        generator = torch.Generator().manual_seed(i % 4)
        yield torch.randint(0, SIZES["vocab_size"], (2, 5 + i % lengths), generator=generator)


def train(
    model: nn.Module,
    *,
    steps: int = STEPS,
    parts: int = 1,
    lengths: int = 4,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    between: Callable[[nn.Module], Any] | None = None,
) -> Trace:
    """Train with SGD, slowly: AdamW makes a full step of a gradient that is all rounding, and at
    0.01 two trainings in bfloat16 were 75 % apart in their gradients after 20 steps (5 % at 0.002).

    Args:
        parts: backward passes that are accumulated to one step.
        between: called between every forward and its backward.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.002, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    trace = Trace()
    torch.manual_seed(3)
    data = batches(steps * parts, lengths)
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(parts):
            ids = next(data)
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                loss = model(input_ids=ids, labels=ids).loss / parts
            if between is not None:
                between(model)
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        gradients = [p.grad.double().flatten() for p in trained if p.grad is not None]
        trace.losses.append(total)
        trace.gradients.append(torch.cat(gradients))
        trace.scales.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    return trace


def errors(found: Trace, oracle: Trace) -> tuple[list[float], float]:
    """Relative error of every step's gradients, and the norm of the errors of all losses."""
    steps = zip(found.gradients, oracle.gradients, strict=True)
    losses = torch.tensor(found.losses) - torch.tensor(oracle.losses, dtype=torch.float64)
    return [float((g - exact).norm() / exact.norm()) for g, exact in steps], float(losses.norm())


def assert_parity(found: Trace, stock: Trace, oracle: Trace, eps: float = EPS) -> None:
    """The training learned something, and ours is as near to the oracle as stock peft is."""
    assert sum(oracle.losses[-4:]) < sum(oracle.losses[:4])
    (ours, our_loss), (theirs, their_loss) = errors(found, oracle), errors(stock, oracle)
    assert median(a / b for a, b in zip(ours, theirs, strict=True)) <= RATIO
    unit = eps * float(torch.tensor(oracle.losses).norm())  # one in the last place of every loss
    assert our_loss <= RATIO * max(their_loss, unit)


def check_parity(make: Callable[[], nn.Module], eps: float = EPS, **options: Any) -> None:
    """Train three copies: on GraspLoRALinear, on stock layers, and on those in float64."""
    ours = make()
    report = gk.replace_lora_layers(ours)
    assert not report.fallbacks
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA layers run peft's own forward")
        found = train(ours, **options)
    stock = train(with_same_masks(make()), **options)
    exact = {**options, "autocast": None, "scaler": None}
    assert_parity(found, stock, train(with_same_masks(make()).double(), **exact), eps)


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.2},
    "rslora": {"use_rslora": True, "lora_alpha": 6},
    "lora_bias": {"lora_bias": True, "lora_alpha": 4},
    "patterns": {"rank_pattern": {"q_proj": 8, "down_proj": 24}, "alpha_pattern": {"o_proj": 32}},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "tied": {"base": {"tie_word_embeddings": True}, "target_modules": [*SOME, "lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_train_as_with_stock_peft(name: str) -> None:
    check_parity(lambda: lora_model(**ADAPTERS[name]))


def test_gradient_accumulation() -> None:
    check_parity(lambda: lora_model(lora_dropout=0.1), parts=2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_with_dropout(use_reentrant: bool) -> None:
    def make() -> nn.Module:
        model = lora_model(lora_dropout=0.2)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        return model

    check_parity(make)


def test_frozen_adapters_and_trained_norms() -> None:
    def make() -> nn.Module:
        model = lora_model()
        for name, parameter in model.named_parameters():
            frozen = ".layers.1." in name or "layers.0.mlp.down_proj.lora_A" in name
            parameter.requires_grad_("norm" in name or ("lora_" in name and not frozen))
        return model

    check_parity(make)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, None])
def test_autocast(dtype: torch.dtype, base: torch.dtype | None) -> None:
    """Over a float32 base, and over one in half precision with float32 adapters (peft's way)."""

    def make() -> nn.Module:
        config = LoraConfig(r=16, lora_alpha=16, target_modules=list(ALL_LINEAR))
        model = get_peft_model(qwen().to(base or dtype), config)
        randomise_adapter(model)
        return model

    check_parity(make, eps=torch.finfo(dtype).eps, autocast=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_in_half_precision(dtype: torch.dtype) -> None:
    check_parity(lambda: lora_model().to(dtype), eps=torch.finfo(dtype).eps)


def test_grad_scaler_finds_infinities_where_it_did() -> None:
    """A scale at which float16 overflows: the same steps are skipped, then training goes on."""

    def run(model: nn.Module) -> Trace:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=5)
        return train(model, autocast=torch.float16, scaler=scaler)

    ours = lora_model()
    gk.replace_lora_layers(ours)
    found, stock = run(ours), run(lora_model())
    assert found.scales == stock.scales
    assert min(found.scales) < found.scales[0]  # steps were skipped
    finite = [bool(g.isfinite().all()) for g in found.gradients]
    assert finite == [bool(g.isfinite().all()) for g in stock.gradients]
    assert set(finite) == {True, False}


# --- several adapters


def two_adapters() -> PeftModel:
    """`default` on the writers and q, `other` on q and v with another rank."""
    model = lora_model(target_modules=list(SOME))
    other = LoraConfig(r=12, lora_alpha=12, target_modules=["q_proj", "v_proj"])
    model.add_adapter("other", other)
    randomise_adapter(model)
    return model


def test_only_the_active_adapter_is_trained() -> None:
    def make() -> PeftModel:
        model = two_adapters()
        model.set_adapter("other")
        return model

    check_parity(make)
    model = make()
    gk.replace_lora_layers(model, a_subspace(model))
    before = {n: p.clone() for n, p in model.named_parameters() if ".default." in n}
    train(model, steps=3)
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name]), name


def test_adapters_are_switched_as_in_peft() -> None:
    stock, ours = two_adapters(), two_adapters()
    gk.replace_lora_layers(ours)
    for name in ("other", "default", "other"):
        stock.set_adapter(name)
        ours.set_adapter(name)
        torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)
    status = ours.get_model_status()
    assert (status.num_adapter_layers, status.enabled) == (4 * 2, True)
    assert status.available_adapters == ["default", "other"]


def test_batches_of_several_adapters_fall_back_and_say_so() -> None:
    model = two_adapters().eval()
    ids, names = tokens(3), ["default", "other", "__base__"]
    with torch.no_grad():
        expected = model(input_ids=ids, adapter_names=names).logits
        gk.replace_lora_layers(model)
        with pytest.warns(UserWarning, match="not accelerated: extra arguments") as told:
            found = model(input_ids=ids, adapter_names=names).logits
    assert torch.equal(found, expected)
    assert len(told) == 1


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "magnitude_prune"])
def test_weighted_adapters(kind: str) -> None:
    """Combinations of closed adapters are closed; those by element once layers are replaced again.

    The adapters are open when they are combined, as an optimizer leaves them.
    """

    def combined(model: PeftModel) -> PeftModel:
        options = {"combination_type": kind, "density": 0.5}
        model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", **options)
        model.set_adapter("both")
        return model

    def make() -> PeftModel:
        model = lora_model(r=4)
        model.add_adapter("other", LoraConfig(r=4, target_modules=list(ALL_LINEAR)))
        randomise_adapter(model)
        return model

    ours = make()
    gk.replace_lora_layers(ours)
    expected = logits(combined(make()))
    torch.testing.assert_close(logits(combined(ours)), expected, rtol=1e-4, atol=1e-4)

    closed = make()
    subspace = a_subspace(closed)
    gk.replace_lora_layers(closed, subspace)
    randomise_adapter(closed, seed=7)
    combined(closed)
    if kind in ("ties", "magnitude_prune"):
        gk.replace_lora_layers(closed, subspace)
    for leak in gk.leakage(closed).values():
        assert all(share is None or share <= 1e-6 for share in leak)


# --- variants, which stay with peft

VARIANTS: dict[str, dict[str, Any]] = {
    "DoraLinearVariant": {"use_dora": True},
    "ALoraLinearVariant": {"alora_invocation_tokens": [1, 2]},
    "MiCALinearVariant": {"init_lora_weights": "mica"},
    "VeloraLinearVariant": {"velora_config": VeloraConfig()},
    "KasaLinearVariant": {"kasa_config": KasaConfig()},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_stay_with_peft_and_are_reported(name: str) -> None:
    model = lora_model(r=4, target_modules=list(WRITERS), **VARIANTS[name])
    expected = logits(model)
    with pytest.warns(UserWarning, match=f"4 of 4 LoRA layers stay with peft.*{name}") as told:
        report = gk.replace_lora_layers(model, a_subspace(model, side="write"))
    assert len(told) == 1
    assert set(report.fallbacks.values()) == {f"the LoRA variant {name}"}
    assert f"down_proj: the LoRA variant {name}" in str(report)
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:.*LoRA layers stay with peft")
def test_dora_trains_as_with_stock_peft_and_is_projected() -> None:
    def make() -> PeftModel:
        return lora_model(target_modules=list(WRITERS), use_dora=True)

    ours, projected = make(), make()
    gk.replace_lora_layers(ours)
    found, stock = train(ours), train(make())
    assert found.losses == stock.losses
    assert all(map(torch.equal, found.gradients, stock.gradients))
    subspace = a_subspace(projected, side="write")
    gk.replace_lora_layers(projected, subspace)
    _, gradients = loss_and_gradients(projected)
    for name, gradient in gradients.items():
        site = name.removeprefix("base_model.model.").split(".lora_B")[0]
        if ".lora_B." in name:  # dB = diag(m / ‖W + ΔW‖) dY'ᵀ s X Aᵀ
            layer: Any = projected.get_submodule(f"base_model.model.{site}")
            changed = layer.base_layer.weight + layer.get_delta_weight("default")
            scale = layer.lora_magnitude_vector["default"].weight / changed.norm(dim=1)
            through = gradient / scale.detach()[:, None]
            assert (subspace.write[site].mT @ through).norm() <= 1e-5 * through.norm()


# --- torch.compile


def test_a_whole_model_compiled_into_one_graph_trains_as_stock_peft() -> None:
    def make() -> PeftModel:
        base = tiny_model()
        base.model.layers = base.model.layers[:1]
        config = LoraConfig(r=16, lora_alpha=16, target_modules=list(SOME), lora_dropout=0.1)
        model = get_peft_model(base, config)
        randomise_adapter(model)
        return model

    ours = make()
    gk.replace_lora_layers(ours)
    counter = CompileCounterWithBackend("aot_eager")
    found = train(torch.compile(ours, fullgraph=True, backend=counter), lengths=1)
    assert counter.frame_count == 1
    stock, exact = with_same_masks(make()), with_same_masks(make()).double()
    assert_parity(found, train(stock, lengths=1), train(exact, lengths=1))


def test_lengths_do_not_compile_again_and_again() -> None:
    """The first length, then any length. (A whole model in transformers 5 does the same.)"""
    model = lora_model(lora_dropout=0.3)
    gk.replace_lora_layers(model, a_subspace(model))
    block = model.get_base_model().model.layers[0].mlp.train()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(block, fullgraph=True, backend=counter)
    trained = [p for p in block.parameters() if p.requires_grad]
    for T in (5, 9, 16, 33, 7):
        x = torch.randn(2, T, 32, requires_grad=True)
        results = []
        for call in (block, run):
            torch.manual_seed(T)
            y = call(x)
            results.append([y, *torch.autograd.grad(y.square().mean(), [x, *trained])])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 2


def test_compiled_checkpoints_draw_the_mask_again() -> None:
    model = lora_model(lora_dropout=0.3)
    gk.replace_lora_layers(model, a_subspace(model))
    block = model.get_base_model().model.layers[0].mlp.train()
    trained = [p for p in block.parameters() if p.requires_grad]
    run = torch.compile(
        lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(2, 7, 32, requires_grad=True)
    results = []
    for call in (block, run):
        torch.manual_seed(5)
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().mean(), [x, *trained])])
    assert all(map(torch.equal, *results))


def closable_layer() -> gk.GraspLoRALinear:
    """A layer whose B is open, as an optimizer leaves it."""
    basis = orthonormal(20, 2, torch.Generator().manual_seed(0))
    layer = gk.GraspLoRALinear.from_linear(nn.Linear(24, 20), write_basis=basis)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def test_compiled_code_sees_that_a_base_weight_changed() -> None:
    layer = closable_layer()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def gradient(call: Any) -> Tensor:
        x = torch.ones(3, 24, requires_grad=True)
        call(x).square().sum().backward()
        return x.grad

    gradient(layer)
    gradient(run)
    with torch.no_grad():
        layer.base_layer.weight.mul_(-0.5)
    torch.testing.assert_close(gradient(run), gradient(layer))


def test_a_compiled_layer_can_do_without_its_adapter() -> None:
    layer = closable_layer()
    layer.enable_adapters(False)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24)
    assert torch.equal(run(x), layer.base_layer(x))


# --- what happens between steps


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        logits(model)
    model.train()


def without_gradients(model: nn.Module) -> None:
    logits(model)
    model.train()


def reference_model(model: Any) -> None:
    """What preference training does: the same model without its adapter."""
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=tokens())


def generation(model: Any) -> None:
    model.eval().generate(input_ids=tokens(1, 3), max_new_tokens=3, do_sample=False)
    model.train()


def a_closed_model(seed: int = 1) -> PeftModel:
    model = lora_model(target_modules=list(SOME))
    gk.replace_lora_layers(model, a_subspace(model))
    randomise_adapter(model, seed)
    return model


@pytest.mark.parametrize(
    "call", [in_inference_mode, without_gradients, reference_model, generation]
)
def test_forwards_before_and_between_change_nothing(call: Any) -> None:
    """Before the first step, and between every forward and its backward."""
    undisturbed, disturbed = train(a_closed_model(), steps=4), a_closed_model()
    call(disturbed)
    found = train(disturbed, steps=4, between=call)
    assert found.losses == undisturbed.losses
    assert all(map(torch.equal, found.gradients, undisturbed.gradients))


@pytest.mark.parametrize("call", [lambda m: m.state_dict(), gk.leakage])
def test_closing_between_forward_and_backward_changes_rounding_alone(call: Any) -> None:
    undisturbed, found = (
        train(a_closed_model(), steps=4),
        train(a_closed_model(), steps=4, between=call),
    )
    torch.testing.assert_close(found.losses, undisturbed.losses, rtol=1e-6, atol=0.0)
    for one, other in zip(found.gradients, undisturbed.gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_factors_made_in_inference_mode_serve_a_training_step() -> None:
    """The kernels' factors of all layers come out of one launch, that of the first layer."""
    model = lora_model(target_modules=["q_proj"], r=4)
    gk.replace_lora_layers(model, a_subspace(model), backend="triton")
    first, second = (block.self_attn.q_proj for block in model.get_base_model().model.layers)
    x = torch.randn(3, 32)
    with torch.inference_mode():
        for layer in (first, second, first):
            layer(x)
    second(x.requires_grad_()).sum().backward()
    assert second.lora_B["default"].weight.grad is not None


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = lora_model(target_modules=list(SOME))
        expected = logits(model)
        gk.replace_lora_layers(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        gk.replace_lora_layers(model, a_subspace(model))
        logits(model)


def test_a_retained_graph_gives_the_same_again() -> None:
    model = a_closed_model()
    _, once = loss_and_gradients(model)
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    for _ in range(2):
        loss.backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        assert name not in once or torch.equal(parameter.grad, 2 * once[name]), name


def test_a_trained_base_weight_gets_its_gradient() -> None:
    def make() -> PeftModel:
        model = lora_model(target_modules=list(SOME))
        model.get_base_model().model.layers[0].mlp.down_proj.base_layer.requires_grad_(True)
        return model

    ours, toggled = make(), lora_model(target_modules=list(SOME))
    _, expected = loss_and_gradients(make())
    with pytest.warns(UserWarning, match=r"1 of 6.*\(the base weight is trained too\)"):
        gk.replace_lora_layers(ours)
    assert_same_gradients(loss_and_gradients(ours)[1], expected)
    gk.replace_lora_layers(toggled)
    toggled.get_base_model().model.layers[0].mlp.down_proj.base_layer.requires_grad_(True)
    with pytest.warns(UserWarning, match="not accelerated: the base weight is trained too"):
        assert_same_gradients(loss_and_gradients(toggled)[1], expected)


def test_what_is_not_accelerated_is_said_once() -> None:
    model = two_adapters()
    gk.replace_lora_layers(model)
    model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="not accelerated: 2 active adapters") as told:
        logits(model)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model)
        model.base_model.set_adapter("other")  # which the writers do not have
        logits(model)
        with model.disable_adapter():
            logits(model)
        model.merge_adapter()
        logits(model)


# --- other devices, dtypes and copies


def test_casting_back_and_forth_keeps_what_is_projected() -> None:
    model = lora_model(target_modules=list(SOME))
    subspace = a_subspace(model)
    gk.replace_lora_layers(model, subspace)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model.to(dtype)
        loss_and_gradients(model)
    # The frequencies of the rotary embedding are rounded, too.
    other = lora_model(target_modules=list(SOME)).half().bfloat16().float()
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            theirs.copy_(ours)
    gk.replace_lora_layers(other, subspace)
    assert_same_gradients(loss_and_gradients(model)[1], loss_and_gradients(other)[1])


def test_emptied_models_keep_their_bases() -> None:
    model = a_closed_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    _, expected = loss_and_gradients(model)
    model.to_empty(device="cpu").load_state_dict(weights)
    model.model.model.rotary_emb.__init__(model.config)  # a buffer that no checkpoint has either
    assert_same_gradients(loss_and_gradients(model)[1], expected)


def test_copies_are_independent(tmp_path: Path) -> None:
    """Also of the hooks on writers that have no adapter (`o_proj` here)."""
    model = lora_model(target_modules=["q_proj", "down_proj"])
    gk.replace_lora_layers(model, a_subspace(model))
    _, expected = loss_and_gradients(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert_same_gradients(loss_and_gradients(other)[1], expected)
        gk.restore_lora_layers(other)
        assert not any(m._forward_hooks for m in other.modules())
    assert_same_gradients(loss_and_gradients(model)[1], expected)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert (
        torch.load(tmp_path / "weights.pt", weights_only=True).keys() == model.state_dict().keys()
    )


# --- loading and going on


def saved_adapter(folder: Path) -> Path:
    lora_model().save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_trains_on(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    folder = saved_adapter(tmp_path)

    def make() -> nn.Module:
        options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
        return PeftModel.from_pretrained(qwen(), folder, **options)

    check_parity(make)


def test_layers_may_be_replaced_before_their_weights_come(tmp_path: Path) -> None:
    """A model without data, then its weights: the bases are those of the subspace."""
    loaded = lora_model(target_modules=list(SOME))
    subspace = a_subspace(loaded)
    with torch.device("meta"):
        empty = get_peft_model(
            qwen(),
            LoraConfig(r=16, lora_alpha=16, target_modules=list(SOME)),
            low_cpu_mem_usage=True,
        )
    gk.replace_lora_layers(empty, subspace)
    for module in (empty, loaded):
        assert not module.load_state_dict(loaded.state_dict(), assign=True).missing_keys
    gk.replace_lora_layers(loaded, subspace)
    x = torch.randn(3, 48)
    for name, layer in loaded.named_modules():
        if name.endswith("down_proj"):
            torch.testing.assert_close(empty.get_submodule(name)(x), layer(x))


def test_an_adapter_loaded_over_another_one(tmp_path: Path) -> None:
    model = lora_model()
    gk.replace_lora_layers(model)
    saved = saved_adapter(tmp_path)
    randomise_adapter(model, seed=9)
    model.load_adapter(saved, "default", is_trainable=True)
    model.load_adapter(saved, "second")
    for name in ("default", "second"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(lora_model()), rtol=1e-5, atol=1e-5)


def test_part_of_the_pretrained_weights_in_the_adapter_is_not_closed_away() -> None:
    model = lora_model(init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"'default' was initialised with 'pissa'.*closed=False"):
        gk.replace_lora_layers(model, a_subspace(model))
    expected = logits(model)
    gk.replace_lora_layers(model, a_subspace(model), closed=False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def trainer(folder: Path, projected: bool) -> Trainer:
    """Of transformers, with AdamW, dropout and a checkpoint after 10 of 20 steps."""
    model = lora_model(target_modules=list(SOME), lora_dropout=0.1 if projected else 0.0)
    if projected:
        gk.replace_lora_layers(model, a_subspace(model))
    ids = [row for batch in batches(8) for row in batch[:, :5]]
    options = {"save_steps": 10, "save_total_limit": 3, "logging_steps": 1}
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, use_cpu=True, report_to="none", disable_tqdm=True, **options
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=arguments, train_dataset=data)


def test_trainer_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = trainer(tmp_path, projected=True)
    whole.train()
    resumed = trainer(tmp_path / "resumed", projected=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(other[name], value), name


def test_trainer_loses_as_with_stock_peft(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / name, projected=False) for name in ("ours", "stock")]
    gk.replace_lora_layers(runs[0].model)
    for run in runs:
        run.train()
    found, expected = (
        [entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs
    )
    assert len(expected) == STEPS
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)
