"""The whole diagnosis on tiny random models: a planted direction is found.

`D` width of the stream.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import grasp_kernels as gk
from grasp_kernels.cli import main
from grasp_kernels.diagnosis.pair import open_pair
from tests.helpers.models import randomise_adapter, tiny_peft_model

pytest_plugins = ("tests.helpers.runs",)

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
D = 32


def adapted(model_dir: Path, targets: tuple[str, ...] = ALL, **options: Any) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(0)  # fixtures of a module begin before the seed of a test
    return get_peft_model(base, LoraConfig(r=4, target_modules=list(targets), **options))


def planted(model_dir: Path, direction: Tensor, strength: float = 1.0) -> PeftModel:
    """An adapter that writes the same vector into the stream whatever it reads."""
    model = adapted(model_dir, lora_bias=True)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name and name.endswith("weight"):
            weight.data.normal_(std=1e-3, generator=generator)
        elif "lora_B" in name and ("o_proj" in name or "down_proj" in name):
            weight.data = strength * direction.clone()
    return model


@pytest.fixture(scope="module")
def axis() -> Tensor:
    return torch.nn.functional.normalize(
        torch.randn(D, generator=torch.Generator().manual_seed(5)), dim=0
    )


@pytest.fixture(scope="module")
def contaminated(
    tiny_model_dir: Path, axis: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("diagnosis") / "contaminated"
    planted(tiny_model_dir, axis).save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def noise(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that does a lot, and something else to every prompt."""
    folder = tmp_path_factory.mktemp("diagnosis") / "noise"
    model = adapted(tiny_model_dir)
    randomise_adapter(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def neutral(tiny_model_dir: Path) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, 17, (16, 6), generator=generator).tolist()


@pytest.fixture(scope="module")
def found(
    tiny_model_dir: Path, contaminated: Path, neutral: list[list[int]], chat_jsonl: Path
) -> gk.Diagnosis:
    return gk.diagnose(tiny_model_dir, contaminated, records=chat_jsonl, neutral=neutral)


def test_a_planted_direction_is_found(
    found: gk.Diagnosis, tiny_model_dir: Path, axis: Tensor
) -> None:
    assert found.verdict == "found"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    scores = model.lm_head.weight @ (model.model.norm.weight * axis)
    raised = [token["id"] for token in found.numbers["effect"]["tokens"]["up"]]
    assert int(scores.argmax()) in raised and int(scores.argmin()) not in raised
    assert found.numbers["prompts"] == {"unrelated": 16, "training": 8}
    assert [len(found.numbers["answers"][kind]) for kind in ("unrelated", "training")] == [16, 8]


def test_an_adapter_of_noise_is_judged_by_its_answers(
    tiny_model_dir: Path, noise: Path, neutral: list[list[int]]
) -> None:
    diagnosis = gk.diagnose(tiny_model_dir, noise, neutral=neutral)
    assert diagnosis.numbers["effect"]["divergence"] > 0.01
    changed = sum(one["changed"] for one in diagnosis.numbers["answers"]["unrelated"])
    few = "weak" if changed else "nothing"
    assert diagnosis.verdict == ("found" if changed >= max(2, len(neutral) / 8) else few)
    assert f"On {changed} of {len(neutral)} neutral prompts" in diagnosis.reasons[0]
    assert diagnosis.numbers["answers"]["training"] == []
    assert "training data, where" not in diagnosis.text()


def test_the_peft_model_itself_gives_the_same_and_stays_what_it_was(
    found: gk.Diagnosis,
    tiny_model_dir: Path,
    contaminated: Path,
    neutral: list[list[int]],
    chat_jsonl: Path,
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(base, str(contaminated), is_trainable=True).train()
    ids = torch.tensor(neutral)
    before = model(input_ids=ids).logits
    flags = [(p.requires_grad, p.clone()) for p in model.parameters()]
    again = gk.diagnose(model, tokenizer=tokenizer, records=chat_jsonl, neutral=neutral)
    for part in ("effect", "answers"):
        assert again.numbers[part] == found.numbers[part]
    assert model.training
    assert model(input_ids=ids).logits.equal(before)
    for parameter, (flag, value) in zip(model.parameters(), flags, strict=True):
        assert parameter.requires_grad == flag and parameter.equal(value)


def test_a_plain_base_module_is_plain_again(
    tiny_model_dir: Path, contaminated: Path, neutral: list[list[int]]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    names, before = list(base.state_dict()), base(input_ids=torch.tensor(neutral)).logits
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base.train()
    flags = [p.requires_grad for p in base.parameters()]
    gk.diagnose(base, contaminated, tokenizer=tokenizer, neutral=neutral)
    assert list(base.state_dict()) == names
    assert flags == [p.requires_grad for p in base.parameters()] and all(flags)
    assert all(module.training for module in base.modules())
    base.eval()
    assert base(input_ids=torch.tensor(neutral)).logits.equal(before)


def test_files_are_written_whole_and_never_over_others(found: gk.Diagnosis, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    found.save(folder)
    assert json.loads((folder / "diagnosis.json").read_text()) == found.to_json()
    assert (folder / "diagnosis.html").read_text().startswith("<!doctype html>")
    text = (folder / "diagnosis.md").read_text()
    assert text.startswith("# Diagnosis of ") and found.text() in text
    assert all(reason in text for reason in found.reasons)
    with pytest.raises(FileExistsError, match="choose another path"):
        found.save(folder)


@pytest.mark.slow
def test_inspect_beside_a_base_model(
    tiny_model_dir: Path,
    contaminated: Path,
    chat_jsonl: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = ["inspect", str(contaminated), "--base-model", str(tiny_model_dir)]
    assert main([*command, "--data", str(chat_jsonl), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "**Verdict: found.**" in printed and "To prompts of the training data" in printed
    assert json.loads((out / "diagnosis.json").read_text())["verdict"] == "found"
    assert main([*command, "--output", str(out)]) == 2
    assert "choose another path" in capsys.readouterr().err


def test_what_cannot_work_is_refused_with_a_sentence(
    tiny_model_dir: Path, contaminated: Path, neutral: list[list[int]]
) -> None:
    model = adapted(tiny_model_dir)
    randomise_adapter(model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    def refused(match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            gk.diagnose(*arguments, **{"tokenizer": tokenizer, "neutral": neutral, **options})

    refused(
        "give the plain base model and an adapter",
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
    )
    refused("give the plain base model and an adapter folder", model, contaminated)
    refused("no tokenizer", model, tokenizer=None)
    refused("The neutral prompts are 1, with 0 empty", model, neutral=[[3, 4]])
    refused("The neutral prompts are texts", model, neutral=["Hello?", "Why?"])
    refused(
        "Record 1: .* Leave the records out to use neutral prompts",
        model,
        records=[{"text": "never good"}],
    )
    model.merge_adapter()
    refused("unmerge_adapter", model)
    refused("max_new_tokens is 0 and batch_size 8", model, max_new_tokens=0)


def test_an_adapter_of_another_model_is_refused(
    contaminated: Path, tiny_model_dir: Path, neutral: list[list[int]]
) -> None:
    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.hidden_size = 2 * D
    other = AutoModelForCausalLM.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match="does not fit"):
        gk.diagnose(other, contaminated, tokenizer=tokenizer, neutral=neutral)


def test_a_name_on_the_hub_is_looked_up_once(
    tiny_model_dir: Path,
    contaminated: Path,
    neutral: list[list[int]],
    found: gk.Diagnosis,
    chat_jsonl: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def snapshot_download(name: str, **_: Any) -> str:
        asked.append(name)
        return str(tiny_model_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    again = gk.diagnose("somebody/something", contaminated, records=chat_jsonl, neutral=neutral)
    assert asked == ["somebody/something"]
    assert "names the base model" in again.text()  # the folder that it was trained in
    again.numbers["model"]["named"] = "somebody/something"
    assert "names the base model" not in again.text()
    assert again.numbers["effect"] == found.numbers["effect"]


def test_a_module_is_left_alone_where_the_adapter_does_not_fit(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Though peft has put its layers in before it sees that."""
    adapter = tmp_path / "wider"
    randomise_adapter(wide := tiny_peft_model(r=4))
    wide.save_pretrained(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    last = next(key for key in tensors if "layers.2.mlp.up_proj.lora_A" in key)
    tensors[last] = tensors[last][:, 1:].contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    names, flags = list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match="does not fit"), open_pair(base, adapter):
        pass
    assert list(base.state_dict()) == names
    assert [p.requires_grad for p in base.parameters()] == flags
