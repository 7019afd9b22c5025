"""peft models on GraspLoRALinear: equality with stock peft, projection, closure, round trips."""

import copy
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, OPTConfig, Qwen2Config

import grasp_kernels as gk
from grasp_kernels.models.architectures import SiteRules
from tests.helpers.comparisons import (
    assert_same_gradients,
    assert_same_logits,
    logits,
    loss_and_gradients,
    total_error,
)
from tests.helpers.models import (
    ALL_LINEAR,
    a_subspace,
    randomise_adapter,
    tiny_model,
    tiny_peft_model,
    tokens,
)
from tests.helpers.oracle import orthonormal


@pytest.mark.parametrize(("config", "lora_bias"), [(LlamaConfig, False), (Qwen2Config, True)])
def test_without_a_subspace_it_is_stock_peft(config: Any, lora_bias: bool) -> None:
    # r = 16: at r = 4 and 32 inputs MKL's A Xᵀ rounds 1.5 times worse than X Aᵀ (at 4096 inputs it
    # is the other way round, 0.5 times).
    model = tiny_peft_model(config_class=config, r=16, lora_bias=lora_bias)
    ratios = []
    for seed in range(9):  # the error of one draw is luck: single ratios range from 0.4 to 2.3
        randomise_adapter(model, seed)
        loss, stock = loss_and_gradients(model)
        report = gk.apply_grasp(model)
        assert len(report.replaced) == 7 * 3
        assert not report.fallbacks
        loss_again, found = loss_and_gradients(model)
        torch.testing.assert_close(loss_again, loss)
        gk.remove_grasp(model)
        _, oracle = loss_and_gradients(model.double())
        model.float()
        ratios.append(total_error(found, oracle) / total_error(stock, oracle))
    assert median(ratios) <= 1.5


@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj", "v_proj"), ("down_proj",)])
def test_residual_projection_is_that_of_the_stream(targets: tuple[str, ...]) -> None:
    """One V at every writer equals projecting the gradient of the stream after every addition."""
    model = tiny_peft_model(targets)
    subspace = a_subspace(model)
    V = subspace.basis
    handles = []

    def project(stream: Tensor) -> None:
        if stream.requires_grad:
            stream.register_hook(lambda gradient: gradient - gradient @ V @ V.mT)

    for block in model.get_base_model().model.layers:
        # The input of this norm is the stream after attention, the block's output that after MLP.
        handles.append(
            block.post_attention_layernorm.register_forward_pre_hook(lambda _, x: project(x[0]))
        )
        handles.append(
            block.register_forward_hook(
                lambda _, __, out: project(out[0] if isinstance(out, tuple) else out)
            )
        )
    model.get_base_model().enable_input_require_grads()
    _, expected = loss_and_gradients(model)
    for handle in handles:
        handle.remove()

    report = gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, orthogonal=False))
    n_adapted_writers = 3 * len({"o_proj", "down_proj"} & set(targets))
    assert len(report.projected) == n_adapted_writers
    assert len(report.hooked_writers) == 6 - n_adapted_writers
    _, found = loss_and_gradients(model)
    # The writer's own dB is projected in both: its dY' is orthogonal to V.
    assert_same_gradients(found, expected)


def test_closure_holds_under_adamw() -> None:
    model = tiny_peft_model(lora_dropout=0.1, lora_bias=True)
    subspace = a_subspace(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids = tokens()
    model.train()
    first = None
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        first = first if first is not None else loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first
    assert max(gk.leakage(model).values()) <= 1e-6
    for name, factor in model.state_dict().items():
        if "o_proj.lora_B.default.bias" in name or "down_proj.lora_B.default.bias" in name:
            assert (subspace.basis.mT @ factor).norm() <= 1e-6 * factor.norm()


def test_an_open_layer_leaks_under_adamw() -> None:
    """What closure is for: AdamW alone lets a projected gradient leak back."""
    model = tiny_peft_model(("o_proj", "down_proj", "q_proj"))
    subspace = a_subspace(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, orthogonal=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        ids = tokens()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert min(gk.leakage(model).values()) > 1e-3


def test_saved_adapter_is_the_trained_function(tmp_path: Path) -> None:
    model = tiny_peft_model(lora_bias=True)
    base_folder = tmp_path / "base"
    tiny_model().save_pretrained(base_folder)
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert all(".lora_A." in key or ".lora_B." in key for key in keys)
    assert len(keys) == 7 * 3 * 3

    stock = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    assert not any(isinstance(m, gk.GraspLoRALinear) for m in stock.modules())
    assert_same_logits(logits(stock), expected, stock)
    state = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert state.keys() == {k for k in stock.state_dict() if "lora_" in k}
    # Saving twice stores the same bits: closing is idempotent.
    model.save_pretrained(tmp_path / "again")
    first, again = (
        (tmp_path / folder / "adapter_model.safetensors").read_bytes()
        for folder in ("adapter", "again")
    )
    assert first == again


def test_auto_peft_model_loads_it(tmp_path: Path) -> None:
    base_folder, adapter_folder = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base_folder)
    model = get_peft_model(
        type(tiny_model()).from_pretrained(base_folder),
        LoraConfig(r=4, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM"),
    )
    randomise_adapter(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    model.save_pretrained(adapter_folder)
    stock = AutoPeftModelForCausalLM.from_pretrained(adapter_folder)
    assert_same_logits(logits(stock), logits(model), stock)


def test_merge_and_unmerge() -> None:
    model = tiny_peft_model()
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    expected, stock = logits(model), copy.deepcopy(model)
    gk.remove_grasp(stock)
    model.merge_adapter()
    assert_same_logits(logits(model), expected, stock)
    model.unmerge_adapter()
    assert_same_logits(logits(model), expected, stock)
    merged = model.merge_and_unload()
    assert_same_logits(logits(merged), expected, stock)


@pytest.mark.parametrize("how", ["in place", "past the version counter", "another memory"])
def test_the_gradient_is_that_of_the_present_base_weight(how: str) -> None:
    """As after a merge in a training that restarts its adapter."""
    model = tiny_peft_model()
    config = gk.GraspConfig(subspace=a_subspace(model))
    gk.apply_grasp(model, config)
    loss_and_gradients(model)
    weight = model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight
    changed = weight.detach() * torch.linspace(-2, 2, weight.shape[1])
    if how == "in place":
        with torch.no_grad():
            weight.copy_(changed)
    elif how == "another memory":
        weight.data = changed
    else:
        weight.data.copy_(changed)
    _, found = loss_and_gradients(model)
    gk.apply_grasp(model, config)
    _, expected = loss_and_gradients(model)
    assert_same_gradients(found, expected)


def test_disabled_adapter_is_the_base_model() -> None:
    model = tiny_peft_model()
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny_model()))


def test_restore_gives_the_same_function_on_stock_layers() -> None:
    model = tiny_peft_model(("q_proj", "down_proj"))
    parameters = {name: id(p) for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    expected = logits(model)
    gk.remove_grasp(model)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert dict(model.named_buffers()).keys() == buffers.keys()
    kinds = {type(m) for m in model.modules() if isinstance(m, lora.Linear)}
    assert kinds == {lora.Linear}
    assert not any(m._forward_hooks for m in model.modules())
    assert_same_logits(logits(model), expected, model)


def test_a_second_adapter_is_not_changed() -> None:
    model = tiny_peft_model()
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    first = logits(model)
    other = LoraConfig(r=2, target_modules=list(ALL_LINEAR))
    model.add_adapter("other", other)
    randomise_adapter(model, seed=5)
    stock = get_peft_model(
        tiny_model(), LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL_LINEAR))
    )
    stock.add_adapter("other", other)
    randomise_adapter(stock, seed=5)
    model.set_adapter("other")
    stock.set_adapter("other")
    assert_same_logits(logits(model), logits(stock), stock)
    saved = {k: v.clone() for k, v in stock.state_dict().items() if ".other." in k}
    for key, value in model.state_dict().items():
        if ".other." in key:
            assert torch.equal(value, saved[key])
    model.set_adapter("default")
    assert not torch.allclose(logits(model), logits(stock)) or not torch.allclose(
        first, logits(stock)
    )


def test_two_active_adapters_fall_back_to_peft() -> None:
    model = tiny_peft_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(ALL_LINEAR)))
    randomise_adapter(model)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    gk.apply_grasp(model)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert layer.why_stock(torch.zeros(1, 48)) == "2 active adapters"
    torch.testing.assert_close(logits(model), expected)


def test_the_stock_path_is_projected_and_closed_too() -> None:
    model = tiny_peft_model(("down_proj",))
    subspace = a_subspace(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    _, expected = loss_and_gradients(model)
    for module in model.modules():
        if isinstance(module, gk.GraspLoRALinear):
            module.base_layer.register_forward_hook(lambda *_: None)
            assert module.why_stock(torch.zeros(1, 48)) == "a child module has hooks"
    _, found = loss_and_gradients(model)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_over_a_half_precision_base(dtype: torch.dtype) -> None:
    """As peft sets it up: the base in half precision, the adapter in float32, under autocast."""
    config = LoraConfig(r=4, target_modules=list(ALL_LINEAR))
    model = get_peft_model(tiny_model().to(dtype), config)
    randomise_adapter(model)
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert {p.dtype for p in factors.values()} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        _, stock = loss_and_gradients(model)
        gk.apply_grasp(model)
        _, found = loss_and_gradients(model)
    assert {g.dtype for g in found.values()} == {torch.float32}
    gk.remove_grasp(model)
    _, oracle = loss_and_gradients(model.double())
    assert total_error(found, oracle) <= 1.5 * total_error(stock, oracle)


def test_bases_stay_float32_when_the_model_is_cast() -> None:
    model = tiny_peft_model()
    subspace = a_subspace(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    model.bfloat16()
    for name, module in model.named_modules():
        if isinstance(module, gk.GraspLoRALinear) and module.write_basis is not None:
            assert torch.equal(module.write_basis, subspace.basis), name
    model.state_dict()
    assert max(gk.leakage(model).values()) <= 4e-3


def test_from_linear_trains_without_a_peft_model() -> None:
    linear = torch.nn.Linear(12, 10)
    V = orthonormal(10, 2, torch.Generator().manual_seed(0))
    layer = gk.GraspLoRALinear.from_linear(
        linear, r=3, lora_alpha=6, write_basis=V, lora_dropout=0.1
    )
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight"}
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(64, 12), torch.randn(64, 10)
    for _ in range(10):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    delta = layer.get_delta_weight("default")
    assert delta.norm() > 0
    assert (V.mT @ delta).norm() <= 1e-6 * delta.norm()


@pytest.mark.slow
def test_whole_model_compiles_into_one_graph() -> None:
    model = tiny_peft_model(("q_proj", "down_proj"))
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    _, expected = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens().to(next(model.parameters()).device)
    model.zero_grad()
    compiled(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_with_dropout(use_reentrant: bool) -> None:
    model = tiny_peft_model(lora_dropout=0.3)
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    model.train()
    torch.manual_seed(11)
    _, expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(11)
    _, found = loss_and_gradients(model)
    assert_same_gradients(found, expected)


def test_calling_it_again_starts_afresh() -> None:
    model = tiny_peft_model(("q_proj", "down_proj"))
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    report = gk.apply_grasp(model)
    assert len(report.replaced) == 6
    assert not report.projected
    assert not report.hooked_writers
    assert not any(m._forward_hooks for m in model.modules())


def test_dora_stays_with_peft_and_is_reported() -> None:
    model = tiny_peft_model(("down_proj",), use_dora=True)
    report = gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    assert set(report.fallbacks.values()) == {"the LoRA variant DoraLinearVariant"}
    assert len(report.hooked_writers) == 6
    assert "the LoRA variant DoraLinearVariant" in str(report)


def test_bad_input_is_named() -> None:
    model = tiny_peft_model()
    subspace = a_subspace(model)
    with pytest.raises(ValueError, match="the model has no LoRA layers; wrap it with"):
        gk.apply_grasp(tiny_model())
    with pytest.raises(ValueError, match="backend is 'tpu': choose one of auto, "):
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, backend="tpu"))
    wide = gk.Subspace(torch.eye(40)[:, :1])
    with pytest.raises(
        ValueError, match=r"has width 40 but 'model.layers.0.self_attn.o_proj' writes 32"
    ):
        gk.apply_grasp(model, gk.GraspConfig(subspace=wide))
    # Nothing was changed by the refused calls.
    assert not any(isinstance(m, gk.GraspLoRALinear) for m in model.modules())


def test_an_unknown_architecture_says_how_to_declare_it() -> None:
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 2}
    config = OPTConfig(**sizes, num_hidden_layers=2, vocab_size=64, max_position_embeddings=32)
    base = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["fc2"]))
    names = [f"model.decoder.layers.{i}.fc2" for i in (0, 1)]
    subspace = gk.Subspace(torch.eye(32)[:, :1])
    with pytest.raises(
        ValueError, match=r"'opt' \(modules \['fc1', 'fc2', .*'layers'.*sites=SiteRules\("
    ):
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    rules = SiteRules(writers=("self_attn.out_proj", "fc2"))
    assert gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, sites=rules)).projected == names


def test_a_refused_replacement_leaves_the_model_as_it_was() -> None:
    model = tiny_peft_model()
    subspace = a_subspace(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    before = {name: type(module) for name, module in model.named_modules()}
    last = [m for n, m in model.named_modules() if n.endswith("down_proj")][-1]
    last.base_layer.weight.data = last.base_layer.weight.data.flatten()
    with pytest.raises(ValueError, match="is on this process as a slice"):
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    assert {name: type(module) for name, module in model.named_modules()} == before
