"""Adapters as peft writes them -> factors with their sites; everything else is refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Olmo2Config

from grasp_kernels.adapters import Adapter, load_adapter
from grasp_kernels.models.architectures import SiteRules
from grasp_kernels.subspace import identify
from tests.helpers.folders import edit_config
from tests.helpers.models import randomise_adapter, tiny_model, tiny_peft_model
from tests.helpers.oracle import budget, relative_error

WEIGHTS = "adapter_model.safetensors"


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {layer.name: layer.scaling * layer.lora_B @ layer.lora_A for layer in adapter.layers}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 20, "layers.1.mlp.down_proj": 3}},
        {"rank_pattern": {"^model.layers.1.self_attn.o_proj": 2, "up_proj": 6}},
        {"layers_to_transform": [1]},
        {"bias": "lora_only", "modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"use_rslora": True, "rank_pattern": {"mlp.down_proj": 3}, "alpha_pattern": {"o_proj": 5}},
    ],
)
def test_folder_file_and_model_hold_what_peft_would_merge(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = tiny_peft_model(**options)
    folder = saved(model, tmp_path / "adapter")
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "lm_head" not in name
    }
    expected = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    exact = {
        name: layer.scaling["default"]
        * layer.lora_B["default"].weight.double()
        @ layer.lora_A["default"].weight.double()
        for name, layer in layers.items()
    }
    for source in (model, folder, str(folder), folder / WEIGHTS):
        found = deltas(load_adapter(source))
        assert found.keys() == expected.keys()
        for name, delta in found.items():
            own = relative_error(expected[name], exact[name])
            allowed = budget(own, torch.float32, layers[name].r["default"])
            assert relative_error(delta, exact[name]) <= allowed


def test_stored_dtype_is_kept(tmp_path: Path) -> None:
    model = tiny_peft_model().to(torch.bfloat16)
    assert load_adapter(saved(model, tmp_path)).layers[0].lora_A.dtype == torch.bfloat16


def test_full_weights_in_the_file_are_noted(tmp_path: Path) -> None:
    folder = saved(tiny_peft_model(modules_to_save=["lm_head"]), tmp_path)
    (note,) = load_adapter(folder).notes
    assert "not LoRA factors" in note and "lm_head.weight" in note


def test_every_layer_is_there_and_those_that_write_have_a_site() -> None:
    adapter = load_adapter(tiny_peft_model(("o_proj", "q_proj", "lm_head")))
    assert [layer.name for layer in adapter.layers][:2] == [
        "lm_head",
        "model.layers.0.self_attn.o_proj",
    ]
    assert {layer.name.split(".")[-1] for layer in adapter.layers if layer.site} == {"o_proj"}
    assert len(adapter.layers) == 7 and adapter.notes == ()


def test_an_initialisation_that_moves_the_base_is_noted() -> None:
    adapter = load_adapter(tiny_peft_model(("o_proj",), init_lora_weights="pissa"))
    assert "'pissa', which changes the base weights" in adapter.notes[0]


@pytest.mark.parametrize("from_folder", [False, True])
def test_base_model_gives_gains_and_type(tmp_path: Path, from_folder: bool) -> None:
    model = tiny_peft_model(config_class=Olmo2Config, layers_to_transform=[0])
    adapter_folder = saved(model, tmp_path / "adapter")
    base = tiny_model(Olmo2Config)
    base.save_pretrained(tmp_path / "base")
    adapter = load_adapter(adapter_folder, base_model=tmp_path / "base" if from_folder else base)
    assert adapter.model_type == "olmo2"
    for layer in adapter.layers:
        if layer.site is not None:
            norm = base.get_submodule(str(layer.site.norm))
            assert layer.gain is not None and layer.gain.equal(norm.weight)
        else:
            assert layer.gain is None


@pytest.mark.parametrize("from_folder", [False, True])
def test_a_base_of_another_width_is_refused(tmp_path: Path, from_folder: bool) -> None:
    config = tiny_model().config
    config.hidden_size = 64
    base = type(tiny_model())(config)
    base.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has width 64, but the adapter writes width 32 at 'model\.lay"
    ):
        load_adapter(tiny_peft_model(("o_proj",)), base_model=tmp_path if from_folder else base)


def test_the_base_folder_named_in_the_config_is_used(tmp_path: Path) -> None:
    tiny_model(Olmo2Config).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    folder = saved(tiny_peft_model(("o_proj",), Olmo2Config), tmp_path / "adapter")
    assert load_adapter(folder).layers[0].gain is None
    edit_config(folder, base_model_name_or_path=str(tmp_path / "base"))
    adapter = load_adapter(folder)
    assert adapter.layers[0].gain is not None and adapter.base_model == str(tmp_path / "base")


def test_gains_of_a_backbone_are_found_under_its_shorter_names() -> None:
    backbone = tiny_model(Olmo2Config).model
    model = get_peft_model(backbone, LoraConfig(r=2, target_modules=["o_proj"]))
    randomise_adapter(model)
    adapter = load_adapter(model, base_model=tiny_model(Olmo2Config))
    assert adapter.layers[0].name == "layers.0.self_attn.o_proj"
    assert adapter.layers[0].gain is not None


def test_one_of_several_adapters(tmp_path: Path) -> None:
    model = tiny_peft_model(("o_proj",))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["down_proj"]))
    randomise_adapter(model, seed=3)
    folder = saved(model, tmp_path)
    for source in (model, folder):
        assert len(load_adapter(source).layers) == 3
        second = load_adapter(source, adapter_name="second")
        assert {layer.name.split(".")[-1] for layer in second.layers} == {"down_proj"}
    model.set_adapter("second")
    assert load_adapter(model).layers[0].lora_A.shape[0] == 2
    with pytest.raises(
        ValueError, match=r"no adapter 'third'; give one of \['default', 'second'\]"
    ):
        load_adapter(model, adapter_name="third")
    with pytest.raises(FileNotFoundError, match=r"one of \['second'\]"):
        load_adapter(folder, adapter_name="third")


def test_a_raw_state_dict_with_adapter_names(tmp_path: Path) -> None:
    folder = saved(tiny_peft_model(("o_proj",)), tmp_path)

    def name_them(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".one.weight")] = tensors[key]
            tensors[key.replace(".weight", ".two.weight")] = 2 * tensors.pop(key)

    edit_weights(folder, name_them)
    with pytest.raises(ValueError, match=r"holds the adapters \['one', 'two'\]; save one"):
        load_adapter(folder)
    one, two = (load_adapter(folder / WEIGHTS, adapter_name=name) for name in ("one", "two"))
    assert torch.equal(2 * one.layers[0].lora_B, two.layers[0].lora_B)


def test_a_trainer_checkpoint_is_an_adapter_folder(tmp_path: Path) -> None:
    folder = saved(tiny_peft_model(("o_proj",)), tmp_path / "checkpoint-25")
    save_file({"step": torch.ones(1)}, folder / "optimizer.safetensors")
    (folder / "trainer_state.json").write_text("{}")
    assert len(load_adapter(folder).layers) == 3


def test_rules_of_the_caller() -> None:
    rules = SiteRules(writers=("self_attn.q_proj",))
    adapter = load_adapter(tiny_peft_model(("q_proj", "o_proj")), sites=rules)
    assert {layer.name.split(".")[-1] for layer in adapter.layers if layer.site} == {"q_proj"}
    with pytest.raises(ValueError, match="no LoRA weights that write to the residual stream"):
        identify(tiny_peft_model(("o_proj",)), sites=rules)


def test_an_unknown_architecture_says_how_to_declare_it(tmp_path: Path) -> None:
    folder = saved(tiny_peft_model(("o_proj",)), tmp_path)
    edit_config(folder, auto_mapping={"parent_library": "transformers.models.gemma9.modeling"})
    with pytest.raises(ValueError, match=r"'gemma9'.*\['self_attn.o_proj'\].*sites=SiteRules\("):
        load_adapter(folder)


def refused(folder: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        load_adapter(folder)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    assert ";" in message or "): " in message  # what is wrong; what to do
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "a LOHA adapter"),
        ({"peft_type": None}, "a foreign adapter"),
        ({"use_dora": True}, "DoRA"),
        ({"alora_invocation_tokens": [1]}, r"variant of LoRA.*\(alora_invocation_tokens\)"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "raw parameters"),
        ({"r": 7}, "r=7, lora_alpha=8.*has rank 4"),
        ({"lora_alpha": None}, "lora_alpha=None"),
    ],
)
def test_foreign_configurations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = saved(tiny_peft_model(("o_proj",)), tmp_path)
    edit_config(folder, **changes)
    assert re.search(message, refused(folder))


def first(tensors: dict[str, torch.Tensor], ending: str) -> str:
    return next(key for key in sorted(tensors) if key.endswith(ending))


def put(ending: str, value: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = first(tensors, ending)
        tensors[key] = value(tensors[key])

    return change


def rename(old: str, new: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("lora_A.weight", lambda t: t / 0), r"layers\.0.*lora_A\.weight' has non-finite"),
        (put("lora_B.weight", lambda t: t * torch.nan), r"lora_B\.weight' has non-finite"),
        (put("lora_B.weight", lambda t: t[:, :2].clone()), "must share a rank"),
        (put("lora_A.weight", lambda t: t[..., None, None].clone()), "LoRA on linear layers"),
        (put("lora_A.weight", lambda t: t.to(torch.int8)), "has dtype torch.int8; save"),
        (lambda t: t.pop(first(t, "lora_B.weight")), "has no lora_B for 'model.layers.0"),
        (rename("lora_", "weight_"), "holds no LoRA weights"),
        (rename("lora_A.weight", "lora_embedding_A"), "LoRA on an embedding"),
        (lambda t: t.update({"a.lora_magnitude_vector": torch.ones(2)}), "DoRA"),
        (lambda t: t.update({"a.lora_E": torch.ones(2)}), "an unsupported variant of LoRA"),
        (lambda t: [t[k].zero_() for k in t if "lora_B" in k], "is untrained"),
    ],
)
def test_unfit_weights(tmp_path: Path, change: Any, message: str) -> None:
    folder = saved(tiny_peft_model(("o_proj",)), tmp_path)
    edit_weights(folder, change)
    assert re.search(message, refused(folder))


def test_rank_zero(tmp_path: Path) -> None:
    folder = saved(tiny_peft_model(("o_proj",)), tmp_path)

    def empty(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            tensors[key] = tensor[:0] if "lora_A" in key else tensor[:, :0]

    edit_weights(folder, empty)
    edit_config(folder, r=0)
    assert "whole number of at least 1" in refused(folder)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    assert "no adapter" in refused(tmp_path / "absent", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert "has no adapter_model.safetensors" in refused(tmp_path / "empty", FileNotFoundError)
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not an adapter" in refused(tmp_path / "notes.txt")
    folder = saved(tiny_peft_model(("o_proj",)), tmp_path / "adapter")
    (folder / WEIGHTS).write_text("hello")
    assert "is not a complete safetensors file" in refused(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "is not JSON" in refused(folder)
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json next to" in refused(folder / WEIGHTS, FileNotFoundError)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"not even a pickle")
    assert "is a pickle" in refused(tmp_path)
    assert "is a pickle" in refused(tmp_path / "adapter_model.bin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["embed_tokens", "o_proj"]}, "is an embedding with LoRA"),
    ],
)
def test_unfit_models(options: dict[str, Any], message: str) -> None:
    model = get_peft_model(
        tiny_model(), LoraConfig(**{"r": 2, "target_modules": ["o_proj"], **options})
    )
    with pytest.raises(ValueError, match=message):
        load_adapter(model)


def test_models_without_a_trained_adapter() -> None:
    with pytest.raises(ValueError, match="is untrained"):
        load_adapter(get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["o_proj"])))
    with pytest.raises(ValueError, match="Linear has no adapter; wrap it"):
        load_adapter(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="cannot be read from a int"):
        load_adapter(3)


def test_a_base_folder_without_config(tmp_path: Path) -> None:
    folder = saved(tiny_peft_model(("o_proj",)), tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_adapter(folder, base_model=tmp_path)
