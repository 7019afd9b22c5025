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
from tests.helpers.oracle import relative_error

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
    return logits(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.double().eval()(input_ids=tokens()).logits
    return found


def check_the_same(found: Tensor, meant: Tensor) -> None:
    """Compare logits of float64: weights, norms and softmax (4 in turn) round to float32."""
    assert relative_error(found, meant) < 4 * torch.finfo(torch.float32).eps


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
    check_the_same(found, meant)
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
            assert found == [gk.adapters.portable._MLX]
        elif consumer in named:
            assert len(found) == 1
            assert named[consumer] in found[0]
        else:
            assert found == []


def configured(folder: Path, **values: Any) -> None:
    config = {**config_of(folder), **values}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")


def changed(folder: Path, **values: Tensor) -> None:
    """Put tensors in the place of those with an ending of their name, or beside them."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for end, value in values.items():
        tensors[next((key for key in tensors if key.endswith(f".{end}.weight")), end)] = value
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_base_that_its_initialisation_changed(tmp_path: Path) -> None:
    """peft changes it again on loading, by the rank and the scaling in the file."""
    an_adapter(tmp_path / "adapter", use_rslora=True)
    configured(tmp_path / "adapter", init_lora_weights="olora")
    for consumer in ("vllm", "llama.cpp", "ollama", "openvino"):
        found = consumer_problems(tmp_path / "adapter", consumer)
        assert "(olora)" in found[0]
        assert "the base as it was" in found[0]
    with pytest.raises(ValueError, match=r"'olora'.*path_initial_model_for_weight"):
        gk.fold_scaling(tmp_path / "adapter", tmp_path / "folded")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "LOHA"}, "a LOHA adapter"),
        ({"target_parameters": ["experts.down_proj"]}, "LoRA on raw parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
        ({"r": None}, "r=None"),
        ({"lora_alpha": "x"}, "lora_alpha='x'"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head'"),
    ],
    ids=str,
)
def test_nothing_is_said_of_other_forms(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    an_adapter(tmp_path / "adapter")
    configured(tmp_path / "adapter", **values)
    for consumer in CONSUMERS:
        with pytest.raises(ValueError, match=said):
            consumer_problems(tmp_path / "adapter", consumer)


def test_rslora_of_rank_one_beside_other_ranks(tmp_path: Path) -> None:
    an_adapter(tmp_path / "adapter", use_rslora=True, r=1, rank_pattern={"up_proj": 4})
    assert "rsLoRA" in consumer_problems(tmp_path / "adapter", "llama.cpp")[0]
    configured(tmp_path / "adapter", rank_pattern={})
    assert consumer_problems(tmp_path / "adapter", "llama.cpp") == []


def test_a_tensor_without_a_module(tmp_path: Path) -> None:
    an_adapter(tmp_path / "adapter")
    changed(tmp_path / "adapter", odd=torch.ones(2))
    assert "whole matrices (odd)" in consumer_problems(tmp_path / "adapter", "vllm")[0]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.full((32, 4), torch.nan), "non-finite"),
        (torch.ones(32, 4, dtype=torch.int64), "int64"),
        (torch.ones(5, 3), "share a rank"),
        (torch.full((32, 4), 6e4, dtype=torch.float16), "beyond torch.float16"),
    ],
    ids=["nan", "whole numbers", "shape", "overflow"],
)
def test_damaged_weights_are_not_folded(tmp_path: Path, value: Tensor, said: str) -> None:
    an_adapter(tmp_path / "adapter")
    changed(tmp_path / "adapter", **{"o_proj.lora_B": value})
    with pytest.raises(ValueError, match=said):
        gk.fold_scaling(tmp_path / "adapter", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_float8_is_scaled_in_float32(tmp_path: Path) -> None:
    an_adapter(tmp_path / "adapter", lora_alpha=8, rank_pattern={"up_proj": 2})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    before = {key: t.to(torch.float8_e4m3fn) for key, t in load_file(file).items()}
    save_file(before, file, metadata={"format": "pt"})
    gk.fold_scaling(tmp_path / "adapter", tmp_path / "folded")
    after = load_file(tmp_path / "folded" / "adapter_model.safetensors")
    for key, tensor in before.items():
        scaling = (4.0 if "up_proj" in key else 2.0) if "lora_B" in key else 1.0
        rows, columns = tensor.shape
        found = after[key][:rows, :columns].float()
        assert torch.equal(found, (tensor.float() * scaling).to(tensor.dtype).float())
        assert after[key].dtype == torch.float8_e4m3fn
        assert after[key].float().norm() == found.norm()


@pytest.mark.parametrize(
    ("module", "value"),
    [("0.mlp.down_proj", torch.ones(32, 48)), ("1.input_layernorm", torch.ones(32) / 3)],
)
def test_what_peft_loads_together_stays_together(
    tmp_path: Path, module: str, value: Tensor
) -> None:
    saved = ["mlp", "norm"]
    an_adapter(tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=saved)
    tiny_model().save_pretrained(tmp_path / "base")
    changed(tmp_path / "adapter", **{module: value})
    meant = logits(PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter")))
    left = gk.fold_scaling(tmp_path / "adapter", tmp_path / "less", base=tmp_path / "base")
    assert len(left) == (7 if "mlp" in module else 9)
    assert config_of(tmp_path / "less")["modules_to_save"] == ["mlp" if "mlp" in module else "norm"]
    found = logits(PeftModel.from_pretrained(tiny_model(), str(tmp_path / "less")))
    check_the_same(found, meant)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gk.fold_scaling(tmp_path / "adapter", tmp_path / "other", base=tmp_path / "nowhere")


def test_weights_of_conv1d(tmp_path: Path) -> None:
    an_adapter(tmp_path / "adapter")
    configured(tmp_path / "adapter", fan_in_fan_out=True)
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
        (["check", "ADAPTER"], "give one (see"),
        (["check", "ADAPTER", "SUBSPACE", "--for", "vllm"], "give one (see"),
        (["check", "ADAPTER", "--for", "vlm"], "--for is 'vlm', which is unknown"),
        (["check", "nowhere", "--for", "vllm"], "There is no adapter 'nowhere'"),
        (["check", "nowhere", "--for", "mlx"], "There is no adapter 'nowhere'"),
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


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    an_adapter(tmp_path / "adapter")
    for name in ("tokenizer.model", "merges.txt", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / "adapter" / name).write_text(name, "utf-8")
    (tmp_path / "adapter" / "optimizer.pt").write_bytes(b"not of the adapter")
    gk.fold_scaling(tmp_path / "adapter", tmp_path / "folded")
    found = {file.name for file in (tmp_path / "folded").iterdir()}
    there = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert there - found == {"optimizer.pt"}
    assert found < there


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
