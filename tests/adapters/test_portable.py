"""A folded adapter computes the same as plain LoRA; what other software makes of the rest."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import grasp_kernels as gk
from grasp_kernels.adapters.portable import CONSUMERS, consumer_problems
from grasp_kernels.cli import main
from tests.helpers.models import ALL_LINEAR, tiny_model, tokens

PATTERNS: dict[str, Any] = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"up_proj": 5}}


def an_adapter(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """Write an adapter with weights that are not zero, and return its logits."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(ALL_LINEAR), **options}
    model: Any = get_peft_model(tiny_model(), LoraConfig(**options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(dtype).float()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return logits(model.float())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tokens()).logits
    return found


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        PATTERNS,
        {"use_rslora": True, **PATTERNS},
        {"lora_bias": True, "lora_alpha": 3},
    ],
    ids=str,
)
def test_it_computes_the_same_as_plain_lora(tmp_path: Path, options: dict[str, Any]) -> None:
    meant = an_adapter(tmp_path / "adapter", **options)
    assert gk.fold_scaling(tmp_path / "adapter", tmp_path / "folded") == ()
    found = logits(PeftModel.from_pretrained(tiny_model(), str(tmp_path / "folded")))
    torch.testing.assert_close(found, meant, rtol=1e-5, atol=1e-5)
    config = config_of(tmp_path / "folded")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == config_of(tmp_path / "adapter")["target_modules"]
    tensors = load_file(tmp_path / "folded" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {4}


def test_it_keeps_the_dtype_and_rounds_once(tmp_path: Path) -> None:
    an_adapter(tmp_path / "adapter", torch.bfloat16, use_rslora=True)
    gk.fold_scaling(tmp_path / "adapter", tmp_path / "folded")
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "folded")
    )
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        scaling = 3.0 if "lora_B" in name else 1.0
        assert torch.equal(after[name], (tensor.float() * scaling).bfloat16())


def test_what_the_base_has_is_left_out(tmp_path: Path) -> None:
    an_adapter(tmp_path / "adapter", modules_to_save=["norm", "lm_head"])
    tiny_model().save_pretrained(tmp_path / "base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    (head,) = (name for name in tensors if "lm_head" in name)
    save_file({**tensors, head: tensors[head] + 1}, file, metadata={"format": "pt"})
    left = gk.fold_scaling(tmp_path / "adapter", tmp_path / "all")
    assert left == ()
    left = gk.fold_scaling(tmp_path / "adapter", tmp_path / "less", base=tmp_path / "base")
    assert len(left) == 7  # peft takes "norm" for the end of a name
    assert left[-1] == "model.norm"
    assert config_of(tmp_path / "less")["modules_to_save"] == ["lm_head"]
    PeftModel.from_pretrained(tiny_model(), str(tmp_path / "less"))


def test_a_run_saves_plain_lora(tmp_path: Path) -> None:
    from grasp_kernels.pipeline.training import save_adapter

    model: Any = get_peft_model(
        tiny_model(), LoraConfig(r=4, use_rslora=True, target_modules=["down_proj"])
    )
    torch.nn.init.normal_(
        model.base_model.model.model.layers[0].mlp.down_proj.lora_B.default.weight
    )
    save_adapter(model, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["use_rslora"] is False
    found = logits(PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter")))
    torch.testing.assert_close(found, logits(model))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, {}),
        ({"use_rslora": True}, {"llama.cpp": "another scale", "ollama": "another scale"}),
        (
            {"alpha_pattern": {"up_proj": 5}},
            dict.fromkeys(("vllm", "llama.cpp", "ollama", "openvino"), "alpha_pattern (up_proj)"),
        ),
        ({"alpha_pattern": {"up_proj": 6}}, {}),  # as everywhere
        ({"rank_pattern": {"down_proj": 2}}, {"vllm": "rank_pattern", "openvino": "rank_pattern"}),
        ({"lora_bias": True}, {"llama.cpp": "refuses", "openvino": "leaves it out"}),
        ({"use_dora": True}, {"vllm": "DoRA", "llama.cpp": "DoRA", "openvino": "DoRA"}),
        (
            {"modules_to_save": ["norm"]},
            {"vllm": "trained norms", "llama.cpp": "trained norms", "openvino": "trained norms"},
        ),
        ({"modules_to_save": ["lm_head"]}, {"vllm": "whole matrices", "llama.cpp": "refuses"}),
        (
            {"target_modules": ["embed_tokens", "down_proj"]},
            {"openvino": "LoRA on the embedding (model.embed_tokens.lora_embedding_A"},
        ),
    ],
    ids=str,
)
def test_what_other_software_makes_of_it(
    tmp_path: Path, options: dict[str, Any], named: dict[str, str]
) -> None:
    an_adapter(tmp_path / "adapter", **options)
    for consumer in CONSUMERS:
        found = consumer_problems(tmp_path / "adapter", consumer)
        if consumer == "mlx":
            assert found == [gk.adapters.portable._ALWAYS["mlx"]]
        elif consumer in named:
            assert len(found) == 1
            assert named[consumer] in found[0]
        else:
            assert found == []


def test_weights_of_conv1d(tmp_path: Path) -> None:
    an_adapter(tmp_path / "adapter")
    config = {**config_of(tmp_path / "adapter"), "fan_in_fan_out": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    (found,) = consumer_problems(tmp_path / "adapter", "llama.cpp")
    assert "turns the update around" in found


def test_folding_leaves_nothing_that_is_scaled_wrongly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    an_adapter(tmp_path / "adapter", use_rslora=True, **PATTERNS)
    adapter, folded = str(tmp_path / "adapter"), str(tmp_path / "folded")
    assert main(["check", adapter, "--for", "llama.cpp"]) == 1
    assert capsys.readouterr().out.count("grasp-kernels fold ADAPTER --output OUT") == 2
    assert main(["fold", adapter, "--output", folded]) == 0
    assert f"Written to {folded}" in capsys.readouterr().out
    for consumer in ("vllm", "llama.cpp", "ollama", "openvino"):
        assert main(["check", folded, "--for", consumer]) == 0
        assert f"{consumer} reads this adapter as peft does." in capsys.readouterr().out
    assert main(["check", folded, "--for", "openvino"]) == 0
    assert "alpha=4)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "ADAPTER"], "give one of the two"),
        (["check", "ADAPTER", "SUBSPACE", "--for", "vllm"], "give one of the two"),
        (["check", "ADAPTER", "--for", "vlm"], "--for is 'vlm', which is unknown"),
        (["check", "nowhere", "--for", "vllm"], "There is no adapter 'nowhere'"),
        (["fold", "nowhere", "--output", "out"], "There is no adapter 'nowhere'"),
        (["fold", "ADAPTER", "--output", "ADAPTER"], "already exists"),
    ],
)
def test_wrong_input_is_named(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    an_adapter(tmp_path / "adapter")
    given = [str(tmp_path / "adapter") if word == "ADAPTER" else word for word in arguments]
    assert main(given) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_exists_is_kept(tmp_path: Path) -> None:
    an_adapter(tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="already exists"):
        gk.fold_scaling(tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises(ValueError, match="DoRA"):
        shutil.rmtree(tmp_path / "adapter")
        an_adapter(tmp_path / "adapter", use_dora=True)
        gk.fold_scaling(tmp_path / "adapter", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no sources of llama.cpp")
@pytest.mark.parametrize("options", [{"use_rslora": True}, PATTERNS], ids=str)
def test_the_converter_of_llama_cpp(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its loader scales by the alpha of the file over the rank of a matrix."""
    sources = Path(os.environ["LLAMA_CPP"])
    sys.path.insert(0, str(sources / "gguf-py"))
    from gguf import GGUFReader  # type: ignore[import-not-found]

    tiny_model().save_pretrained(tmp_path / "base")
    an_adapter(tmp_path / "adapter", **options)
    gk.fold_scaling(tmp_path / "adapter", tmp_path / "folded")
    right: Any = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    layer = right.base_model.model.model.layers[1].mlp.up_proj
    errors = {}
    for name in ("adapter", "folded"):
        out = tmp_path / f"{name}.gguf"
        command = [sys.executable, str(sources / "convert_lora_to_gguf.py"), "--outtype", "f32"]
        command += ["--base", str(tmp_path / "base"), "--outfile", str(out), str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True)
        read = GGUFReader(out)
        (field,) = (f for key, f in read.fields.items() if key.endswith("lora.alpha"))
        tensors = {t.name: torch.tensor(t.data) for t in read.tensors}
        A, B = (tensors[f"blk.1.ffn_up.weight.lora_{letter}"] for letter in "ab")
        found = float(field.parts[field.data[0]][0]) / len(A) * (B @ A)
        meant = layer.get_delta_weight("default").detach()
        errors[name] = float((found - meant).norm() / meant.norm())
    assert errors["folded"] < 1e-6 < 0.1 < errors["adapter"]
