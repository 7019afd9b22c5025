"""What leaves this library: adapters for stock peft and for vLLM, merged models and what they leak.

That a saved adapter is the trained function, and that stock peft loads it, is in
test_replacement.py; projected adapters are in test_closure.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2Config

import grasp_kernels as gk
from grasp_kernels.cli import main
from grasp_kernels.models.names import base_name
from tests.helpers.comparisons import assert_same_logits, logits
from tests.helpers.models import (
    ALL_LINEAR,
    a_subspace,
    randomise_adapter,
    tiny_model,
    tiny_peft_model,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What vLLM takes: `parse_fine_tuned_lora_name` in vllm/lora/utils.py accepts names that end in
# lora_A.weight, lora_B.weight or lora_embedding_A/B and raises at others (a bias too, since it no
# longer has LoRA biases); the last part of the module's name must be that of a linear layer of its
# model (`check_unexpected_modules` in vllm/lora/lora_model.py).
VLLM_NAME = re.compile(
    rf"base_model\.model\.(?P<module>[\w.]+\.({'|'.join(ALL_LINEAR)}))\.(?P<factor>lora_[AB])\.weight"
)


def closed_model(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """On GraspLoRALinear, with open factors, as an optimizer leaves them."""
    model = tiny_peft_model(config_class=Qwen2Config, **options).to(dtype)
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    randomise_adapter(model, seed=7)
    return model


def saved(model: PeftModel, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model.save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return load_file(folder / "adapter_model.safetensors"), config


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.1, "r": 6}])
def test_vllm_knows_every_name_and_the_scale(tmp_path: Path, options: dict[str, Any]) -> None:
    model = closed_model(**options)
    tensors, config = saved(model, tmp_path)
    modules: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = VLLM_NAME.fullmatch(name)
        assert match, name
        modules.setdefault(match["module"], set()).add(match["factor"])
        assert tensor.shape[match["factor"] == "lora_B"] == config["r"]
    assert len(modules) == 7 * 3
    assert all(factors == {"lora_A", "lora_B"} for factors in modules.values())
    # `PEFTHelper` in vllm/lora/peft_helper.py: what it refuses, and the one scale of all layers.
    assert config["bias"] == "none"
    assert not (config["modules_to_save"] or config["use_dora"])
    assert isinstance(config["target_modules"], list)
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1.0)
    for module in model.modules():
        if isinstance(module, gk.GraspLoRALinear):
            assert module.scaling["default"] == scale


def test_the_rule_for_names_refuses_what_vllm_refuses() -> None:
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    assert VLLM_NAME.fullmatch(f"{stem}.lora_A.weight")
    for name in ("write_basis", "lora_B.bias", "lora_A.default.weight", "lora_magnitude_vector"):
        assert not VLLM_NAME.fullmatch(f"{stem}.{name}")


def test_files_are_those_of_stock_peft(tmp_path: Path) -> None:
    """The same names, dtypes and configuration, whatever computed the adapter."""
    stock = tiny_peft_model(config_class=Qwen2Config)
    expected, config = saved(stock, tmp_path / "stock")
    found, again = saved(closed_model(), tmp_path / "ours")
    for both in (config, again):
        both["target_modules"].sort()  # a set in peft
    assert again == config
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The base weights of the adapted layers, by name."""
    return {
        base_name(name): module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and base_name(name).endswith(ALL_LINEAR)
    }


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_rounds_twice_and_unmerging_once_more(dtype: torch.dtype, safe_merge: bool) -> None:
    """ΔW to the dtype, then the sum; the budget is half an ε of each."""
    model, half = closed_model(dtype), torch.finfo(dtype).eps / 2
    before = weights(model)
    for module in model.modules():
        if isinstance(module, gk.GraspLoRALinear):
            module.close_()
    delta = {
        base_name(name): module.scaling["default"]
        * module.lora_B["default"].weight.double()
        @ module.lora_A["default"].weight.double()
        for name, module in model.named_modules()
        if isinstance(module, gk.GraspLoRALinear)
    }
    model.merge_adapter(safe_merge=safe_merge)
    after = weights(model)
    model.unmerge_adapter()
    for name, back in weights(model).items():
        W, change = before[name].double(), delta[name]
        # The product of the factors is summed in float32 before it is rounded.
        budget = half * ((W + change).norm() + 2 * change.norm())
        assert (after[name].double() - (W + change)).norm() <= budget, name
        assert (back.double() - W).norm() <= 2 * budget, name


def test_merged_is_what_stock_peft_merges_from_the_file(tmp_path: Path) -> None:
    model = closed_model()
    saved(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny_model(Qwen2Config), tmp_path).merge_and_unload()
    merged = model.merge_and_unload()
    expected = stock.state_dict()
    assert merged.state_dict().keys() == expected.keys()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_nothing_is_left_in_an_unloaded_model() -> None:
    """The gradient of `o_proj`, which had no adapter, is projected until it is restored."""
    stock, model = (tiny_peft_model(("q_proj", "down_proj")) for _ in range(2))
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    expected = logits(model)
    merged = model.merge_and_unload()
    gk.remove_grasp(merged)
    assert not any(module._forward_hooks for module in merged.modules())
    assert_same_logits(logits(merged), expected, stock)


# --- leakage of merged models


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_model_leaks_what_its_dtype_rounds(dtype: torch.dtype) -> None:
    model = closed_model(dtype)
    subspace, base = a_subspace(model), tiny_model(Qwen2Config).to(dtype)
    original = weights(base)
    # What is stored of closed factors, and the rounding of ΔW and of the sum.
    half = torch.finfo(dtype).eps / 2
    stored = gk.leakage(model)
    merged = model.merge_and_unload()
    leaks = gk.leakage(merged, subspace, base=base)
    assert leaks.keys() == stored.keys()
    for name, leak in leaks.items():
        change = (weights(merged)[name].double() - original[name].double()).norm()
        rounded = half * (1.0 + (original[name].double().norm() + change) / change)
        assert leak <= 1.01 * (stored[name] + rounded) + 1e-6, name


def test_an_open_adapter_leaks_as_much_after_merging(tmp_path: Path) -> None:
    """By models, by folders, and merged in place."""
    model = tiny_peft_model(config_class=Qwen2Config)
    subspace, base = a_subspace(model), tiny_model(Qwen2Config)
    expected = gk.leakage(model, subspace)
    model.merge_adapter()
    found = [gk.leakage(model, subspace, base=base)]
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", max_shard_size="20KB")
    base.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    found.append(gk.leakage(tmp_path / "merged", subspace, base=tmp_path / "base"))
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    found.append(gk.leakage(merged, subspace, base=adapted))
    for leaks in found:
        assert leaks.keys() == expected.keys()
        for name, leak in leaks.items():
            assert leak == pytest.approx(expected[name], rel=1e-4)


def test_an_unchanged_model_leaks_nothing() -> None:
    base = tiny_model()
    leaks = gk.leakage(base, a_subspace(tiny_peft_model()), base=base)
    assert set(leaks.values()) == {0.0}


def test_the_command_line_measures_a_merged_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, base = closed_model(), tiny_model(Qwen2Config)
    a_subspace(model).save(tmp_path / "subspace.safetensors")
    base.save_pretrained(tmp_path / "base")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    arguments = [str(tmp_path / name) for name in ("merged", "subspace.safetensors")]
    assert main(["check", *arguments, "--base-model", str(tmp_path / "base")]) == 0
    assert "within the tolerance" in capsys.readouterr().out


def test_bad_input_is_named(tmp_path: Path) -> None:
    model, base = tiny_peft_model(), tiny_model()
    subspace = a_subspace(model)
    with pytest.raises(ValueError, match="no basis of its own; pass the subspace"):
        gk.leakage(base, base=base)
    with pytest.raises(ValueError, match=r"adapter of 'model.layers.0.self_attn.q_proj' is not me"):
        gk.leakage(model, subspace, base=base)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter of 'model.layers.0.self_attn.q_proj' is merged"):
        gk.leakage(base, subspace, base=model)
    with pytest.raises(FileNotFoundError, match="There are no weights in"):
        gk.leakage(base, subspace, base=tmp_path)
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.o_proj' are .* not quantised"):
        gk.leakage(base, subspace, base=small_model())
    base.model.layers = base.model.layers[:2]
    with pytest.raises(ValueError, match=r"the model has no weight 'model.layers.2"):
        gk.leakage(base, subspace, base=tiny_model())


def small_model() -> nn.Module:
    model = tiny_model()
    layer = model.model.layers[0].self_attn
    layer.o_proj = nn.Linear(16, 32, bias=False)
    return model
