"""Adapters that come, go and are swapped on layers that keep theirs out of a subspace."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import Gemma2Config, GPT2Config, LlamaConfig, Qwen3MoeConfig

import grasp_kernels as gk
from tests.helpers.comparisons import (
    assert_same_gradients,
    assert_same_logits,
    logits,
    loss_and_gradients,
)
from tests.helpers.models import (
    ALL_LINEAR,
    a_subspace,
    bases_of,
    tiny_model,
    tiny_peft_model,
    tokens,
)
from tests.helpers.oracle import orthonormal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of another adapter, which is trained."""
    tiny_peft_model(seed_of_adapter=5).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def model() -> Any:
    found = tiny_peft_model()
    gk.apply_grasp(found, gk.GraspConfig(subspace=a_subspace(found)))
    return found


def stock_of(folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny_model(), folder).eval()


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tokens()
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def leak(model: Any) -> float:
    return max(gk.leakage(model).values())


def delete_and_load(model: Any, folder: Path) -> None:
    model.add_adapter("spare", LoraConfig(r=2, target_modules=list(ALL_LINEAR)))
    model.delete_adapter("default")
    model.load_adapter(folder, "default")
    model.set_adapter("default")


def load_over(model: Any, folder: Path) -> None:
    model.load_adapter(folder, "default")


def load_beside(model: Any, folder: Path) -> None:
    model.load_adapter(folder, "other")
    model.set_adapter("other")


def hotswap(model: Any, folder: Path) -> None:
    hotswap_adapter(model, str(folder), "default")


@pytest.mark.parametrize("bring", [delete_and_load, load_over, load_beside, hotswap])
def test_trained_weights_that_come_in_compute_what_peft_computes(
    model: Any, folder: Path, bring: Callable[[Any, Path], None]
) -> None:
    train(model, 1)
    bring(model, folder)
    stock = stock_of(folder)
    with pytest.warns(UserWarning, match=r"was added to layers .* call apply_grasp again"):
        assert_same_logits(logits(model), logits(stock), stock)
    model.merge_adapter()
    assert_same_logits(logits(model), logits(stock), stock)
    model.unmerge_adapter()
    found = copy.deepcopy(model)
    gk.remove_grasp(found)
    assert_same_logits(logits(found), logits(stock), stock)
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    assert leak(model) <= 1e-6


@pytest.mark.parametrize("bring", [delete_and_load, load_over, load_beside, hotswap])
def test_closed_weights_that_come_in_stay_closed(
    model: Any, tmp_path: Path, bring: Callable[[Any, Path], None]
) -> None:
    """As when a training goes on."""
    train(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was added to layers")
        bring(model, tmp_path)
        for parameter in model.get_base_model().model.layers[0].mlp.down_proj.lora_B.parameters():
            parameter.requires_grad_(True)
        train(model)
    assert leak(model) <= 1e-6


@pytest.mark.parametrize("compiled", [False, True])
def test_a_fresh_adapter_is_closed_from_its_first_step(model: Any, compiled: bool) -> None:
    model.add_adapter("fresh", LoraConfig(r=2, target_modules=list(ALL_LINEAR), lora_bias=True))
    model.set_adapter("fresh")
    if compiled:  # which looks at nothing while it is traced
        layer = model.get_base_model().model.layers[0].mlp.down_proj
        layer.forward = torch.compile(layer.forward, backend="eager")
    train(model, 1)
    assert leak(model) <= 1e-6
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    assert layer.closed_adapters == {"default", "fresh"}
    b = layer.lora_B["fresh"].bias.detach()
    assert (layer.write_basis.mT @ b).norm() <= 1e-6 * b.norm()


def test_nothing_but_a_step_and_a_restore_writes_parameters(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    first = model.state_dict()
    assert leak(model) <= 1e-6
    layer.get_delta_weight("default")
    model.base_model.set_adapter(["default"])
    logits(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"
    assert (layer.write_basis.mT @ first[key]).norm() <= 1e-6 * first[key].norm()
    assert not torch.equal(first[key], before[key])
    assert first.keys() == tiny_peft_model().state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_closing_what_is_closed_changes_no_bit(dtype: torch.dtype) -> None:
    model = tiny_peft_model(lora_bias=True).to(dtype)
    subspace = a_subspace(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    first = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for saved in (model.state_dict(), dict(model.named_parameters())):
        for name, value in first.items():
            assert torch.equal(saved[name], value), name
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, first[name]), name
    for site, V in bases_of(model, subspace).items():
        B = model.get_base_model().get_submodule(site).lora_B["default"]
        for value in (B.weight.detach().double(), B.bias.detach().double()):
            rounding = max(1e-6, torch.finfo(dtype).eps / 4)
            assert (V.double().mT @ value).norm() <= rounding * value.norm()


def test_the_stock_path_is_closed_with_its_gradients() -> None:
    """As the operator: b too, whatever wrote the parameters."""
    ours, stock_path = (tiny_peft_model(lora_bias=True).double() for _ in range(2))
    for model in (ours, stock_path):
        gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    for module in stock_path.modules():
        if isinstance(module, gk.GraspLoRALinear):
            module.base_layer.register_forward_hook(lambda *_: None)
    loss, expected = loss_and_gradients(ours)
    with pytest.warns(UserWarning, match="hooks"):
        loss_again, found = loss_and_gradients(stock_path)
    torch.testing.assert_close(loss_again, loss)
    assert_same_gradients(found, expected)


def test_a_copy_is_kept_closed_too(model: Any) -> None:
    twin = copy.deepcopy(model)
    del model
    train(twin)
    layer = twin.get_base_model().model.layers[0].mlp.down_proj
    B = layer.lora_B["default"].weight.detach()
    assert (layer.write_basis.mT @ B).norm() <= 1e-6 * B.norm()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
@pytest.mark.filterwarnings("ignore:.*stay with peft")
def test_an_unloaded_base_has_no_hooks(how: str, options: dict[str, Any]) -> None:
    model = tiny_peft_model(("q_proj", "v_proj"), **options)
    assert (
        len(gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model))).hooked_writers) == 6
    )
    copied = copy.deepcopy(model)
    base = getattr(model, how)()
    assert [n for n, m in base.named_modules() if m._forward_hooks] == []
    assert not any("unload_and_optionally_merge_module" in vars(m) for m in base.modules())
    assert len([m for m in copied.modules() if m._forward_hooks]) == 6  # it is another one
    gk.remove_grasp(copied)
    assert not any(m._forward_hooks for m in copied.modules())


def test_a_trained_bias_of_a_writer_is_refused() -> None:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    from transformers import GPT2LMHeadModel

    def make(bias: str) -> Any:
        targets = ["c_attn", "c_proj"]
        config = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True, bias=bias)
        return get_peft_model(GPT2LMHeadModel(GPT2Config(**sizes)), config)

    V = orthonormal(32, 1, torch.Generator().manual_seed(0))
    for bias in ("lora_only", "all"):
        model = make(bias)
        subspace = gk.Subspace(V)
        with pytest.raises(ValueError, match=r"bias of '.*c_proj' is trained too, .*bias=\"none"):
            gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, orthogonal=False))
        gk.apply_grasp(model)
    model = make("none")
    gk.apply_grasp(model, gk.GraspConfig(subspace=gk.Subspace(V)))


@pytest.mark.parametrize(
    ("options", "trained", "named"),
    [
        ({"modules_to_save": ["down_proj"]}, "", "weight of 'model.layers.0.mlp.down_proj'"),
        ({}, "down_proj.weight", "weight of 'model.layers.0.mlp.down_proj'"),
        (
            {"target_modules": ALL_LINEAR},
            "o_proj.base_layer.weight",
            "weight of '.*0.self_attn.o_proj'",
        ),
        ({"modules_to_save": ["embed_tokens"]}, "", "weight of 'model.embed_tokens'"),
        ({"trainable_token_indices": [1]}, "", "default of 'model.embed_tokens'"),
        ({"base": Gemma2Config}, "0.post_feedforward_layernorm.weight", "weight of '.*_layernorm'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*stay with peft")
def test_a_trained_weight_that_moves_the_stream_is_refused(
    options: dict[str, Any], trained: str, named: str
) -> None:
    base = tiny_model(options.pop("base", LlamaConfig))
    model = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))
    for name, parameter in model.named_parameters():
        if trained and name.endswith(trained):
            parameter.requires_grad_(True)
    subspace = a_subspace(model)
    with pytest.raises(ValueError, match=f"the {named} is trained too, .*orthogonal=False"):
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, orthogonal=False))
    gk.apply_grasp(model)


def test_experts_take_a_second_adapter() -> None:
    from peft import get_peft_model
    from transformers import Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])

    def make() -> nn.Module:
        torch.manual_seed(0)
        return get_peft_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)), config)

    ours, stock = make(), make()
    V = orthonormal(16, 1, torch.Generator().manual_seed(0))
    subspace = gk.Subspace(V)
    gk.apply_grasp(ours, gk.GraspConfig(subspace=subspace))
    for model in (ours, stock):
        model.add_adapter("second", copy.deepcopy(config))
        model.set_adapter("second")
    assert ours.state_dict().keys() == stock.state_dict().keys()
    train(ours)
    (experts, *_) = [m for m in ours.modules() if hasattr(m, "parameter_name")]
    B = experts.lora_B["second"].weight.detach()
    assert B.any()
    assert (experts.write_basis.mT @ B).norm() <= 1e-6 * B.norm()
