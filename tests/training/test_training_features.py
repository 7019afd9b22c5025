"""What people train with, each feature held against stock peft over 20 steps.

Stock peft and GraspLoRALinear start from the same weights and see the same data; the budget is the
error of stock peft against the same training in float64. Compilation and the calls that come
between two steps are in test_training_calls.py; single steps, the stream's gradient, closure under
AdamW and checkpointing of one step in test_replacement.py, a run that is killed in test_resume.py.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import grasp_kernels as gk
from tests.helpers.comparisons import assert_same_logits, logits, loss_and_gradients
from tests.helpers.models import ALL_LINEAR, a_subspace, randomise_adapter, tokens
from tests.helpers.parity import (
    SOME,
    WRITERS,
    Trace,
    check_parity,
    lora_model,
    qwen,
    train,
    two_adapters,
)

pytestmark = pytest.mark.slow
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
    gk.apply_grasp(ours)
    found, stock = run(ours), run(lora_model())
    assert found.scales == stock.scales
    assert min(found.scales) < found.scales[0]  # steps were skipped
    finite = [bool(g.isfinite().all()) for g in found.gradients]
    assert finite == [bool(g.isfinite().all()) for g in stock.gradients]
    assert set(finite) == {True, False}


# --- several adapters


def test_only_the_active_adapter_is_trained() -> None:
    def make() -> PeftModel:
        model = two_adapters()
        model.set_adapter("other")
        return model

    check_parity(make)
    model = make()
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    before = {n: p.clone() for n, p in model.named_parameters() if ".default." in n}
    train(model, steps=3)
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name]), name


def test_adapters_are_switched_as_in_peft() -> None:
    stock, ours = two_adapters(), two_adapters()
    gk.apply_grasp(ours)
    for name in ("other", "default", "other"):
        stock.set_adapter(name)
        ours.set_adapter(name)
        assert_same_logits(logits(ours), logits(stock), stock)
    status = ours.get_model_status()
    assert (status.num_adapter_layers, status.enabled) == (4 * 2, True)
    assert status.available_adapters == ["default", "other"]


def test_batches_of_several_adapters_fall_back_and_say_so() -> None:
    model = two_adapters().eval()
    ids, names = tokens(3), ["default", "other", "__base__"]
    with torch.no_grad():
        expected = model(input_ids=ids, adapter_names=names).logits
        gk.apply_grasp(model)
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
    gk.apply_grasp(ours)
    stock = combined(make())
    assert_same_logits(logits(combined(ours)), logits(stock), stock)

    closed = make()
    subspace = a_subspace(closed)
    gk.apply_grasp(closed, gk.GraspConfig(subspace=subspace))
    randomise_adapter(closed, seed=7)
    combined(closed)
    if kind in ("ties", "magnitude_prune"):
        gk.apply_grasp(closed, gk.GraspConfig(subspace=subspace))
    assert max(gk.leakage(closed).values()) <= 1e-6


# --- variants, which stay with peft

# The release of peft that brought a variant, and what asks for it.
VARIANTS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "DoraLinearVariant": ("0.20", lambda: {"use_dora": True}),
    "ALoraLinearVariant": ("0.20", lambda: {"alora_invocation_tokens": [1, 2]}),
    "MiCALinearVariant": ("0.20", lambda: {"init_lora_weights": "mica"}),
    "VeloraLinearVariant": ("0.20", lambda: {"velora_config": peft.VeloraConfig()}),
    "KasaLinearVariant": ("0.21", lambda: {"kasa_config": peft.KasaConfig()}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_stay_with_peft_and_are_reported(name: str) -> None:
    since, options = VARIANTS[name]
    if not hasattr(peft.tuners.lora.variants, name):
        pytest.skip(f"peft {peft.__version__} has no {name}, {since} has")
    model = lora_model(r=4, target_modules=list(WRITERS), **options())
    expected = logits(model)
    with pytest.warns(UserWarning, match=f"4 of 4 LoRA layers stay with peft.*{name}") as told:
        report = gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    assert len(told) == 1
    assert set(report.fallbacks.values()) == {f"the LoRA variant {name}"}
    assert f"down_proj: the LoRA variant {name}" in str(report)
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:.*LoRA layers stay with peft")
def test_dora_trains_as_with_stock_peft_and_is_projected() -> None:
    def make() -> PeftModel:
        return lora_model(target_modules=list(WRITERS), use_dora=True)

    ours, projected = make(), make()
    gk.apply_grasp(ours)
    found, stock = train(ours), train(make())
    assert found.losses == stock.losses
    assert all(map(torch.equal, found.gradients, stock.gradients))
    subspace = a_subspace(projected)
    gk.apply_grasp(projected, gk.GraspConfig(subspace=subspace))
    _, gradients = loss_and_gradients(projected)
    for name, gradient in gradients.items():
        site = name.removeprefix("base_model.model.").split(".lora_B")[0]
        if ".lora_B." in name:  # dB = diag(m / ‖W + ΔW‖) dY'ᵀ s X Aᵀ
            layer: Any = projected.get_submodule(f"base_model.model.{site}")
            changed = layer.base_layer.weight + layer.get_delta_weight("default")
            scale = layer.lora_magnitude_vector["default"].weight / changed.norm(dim=1)
            through = gradient / scale.detach()[:, None]
            assert (subspace.basis.mT @ through).norm() <= 1e-5 * through.norm()


# --- torch.compile
