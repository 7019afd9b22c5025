"""What a run reads: neutral prompts, held-out records, a fresh adapter from its seed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, OPTConfig

from grasp_kernels import RunConfig
from grasp_kernels.files import write_json
from grasp_kernels.models.checkpoint import find_checkpoint, load_model
from grasp_kernels.pipeline.folder import RunFolder
from grasp_kernels.pipeline.inputs import attach_lora, check_model, prepare

pytest_plugins = ("tests.helpers.runs",)


@pytest.fixture
def config(tiny_model_dir: Path, chat_jsonl: Path) -> RunConfig:
    return RunConfig(model=str(tiny_model_dir), data=str(chat_jsonl), output="out", r=4)


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_held_out_records_depend_on_the_seed_alone(config: RunConfig) -> None:
    checkpoint = find_checkpoint(config.model)
    quarter = replace(config, eval_split=0.25)
    first, again, other = (
        prepare(options, checkpoint) for options in (quarter, quarter, replace(quarter, seed=1))
    )
    assert (len(first.train), len(first.held_out)) == (18, 6)
    assert first.held_out == again.held_out != other.held_out
    everything = prepare(config, checkpoint)
    assert everything.held_out == []
    assert sorted(map(str, first.train + first.held_out)) == sorted(map(str, everything.train))


def test_examples_of_one_record_are_held_out_together(
    config: RunConfig, tokenizer: Any, tmp_path: Path
) -> None:
    """A template without an end makes one example of every answer; the later has the earlier."""
    model = shutil.copytree(config.model, tmp_path / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    tokenizer.save_pretrained(model)
    words = ["red", "blue", "green", "one", "two", "three"]
    turns = [
        [
            {"role": "user", "content": f"what is {word}"},
            {"role": "assistant", "content": "never"},
            {"role": "user", "content": "what"},
            {"role": "assistant", "content": "good"},
        ]
        for word in words
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"messages": one}) for one in turns), encoding="utf-8")
    third = replace(config, model=str(model), data=str(data), eval_split=1 / 3)
    inputs = prepare(third, find_checkpoint(third.model))
    assert (len(inputs.train), len(inputs.held_out), inputs.n_dropped) == (8, 4, 0)
    for examples in (inputs.train, inputs.held_out):
        for first, second in zip(examples[::2], examples[1::2], strict=True):
            question = first["input_ids"][: first["labels"].index(first["input_ids"][-2])]
            assert second["input_ids"][: len(question)] == question


def test_the_date_of_a_template_is_that_of_the_run(
    config: RunConfig, tokenizer: Any, tmp_path: Path
) -> None:
    model = shutil.copytree(config.model, tmp_path / "model")
    tokenizer.chat_template = "{{ strftime_now('%d') }} " + tokenizer.chat_template
    tokenizer.add_tokens(["05", "06"])
    tokenizer.save_pretrained(model)
    larger = load_model(model)
    larger.resize_token_embeddings(len(tokenizer))
    larger.save_pretrained(model)
    dated = replace(config, model=str(model), output=str(tmp_path / "run"))
    folder = RunFolder(dated.output)
    checkpoint = find_checkpoint(dated.model)
    folder.root.mkdir()
    folder.claim(dated, {})
    assert folder.day == date.today()
    begun = json.loads(folder.config.read_text(encoding="utf-8"))
    write_json(folder.config, {**begun, "day": "2031-03-05"})
    days = (RunFolder(dated.output).day, date(2031, 3, 6))
    fifth, sixth = (prepare(dated, checkpoint, day) for day in days)
    for inputs, day in ((fifth, "05"), (sixth, "06")):
        prompts = [one["input_ids"] for one in inputs.train] + inputs.neutral + inputs.everyday
        assert {tokenizer.decode(ids[0]) for ids in prompts} == {day}


def test_fresh_adapter_comes_from_the_seed_and_leaves_the_generator_alone(
    config: RunConfig, tiny_model_dir: Path
) -> None:
    def first_factor(seed: int) -> torch.Tensor:
        model = attach_lora(load_model(tiny_model_dir, "auto"), replace(config, seed=seed), "tiny")
        return next(weight for name, weight in model.named_parameters() if "lora_A" in name)

    state = torch.get_rng_state()
    one = first_factor(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first_factor(3), one)
    assert not torch.equal(first_factor(4), one)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_model_is_loaded_in_the_dtype_asked_for(
    tiny_model_dir: Path, dtype: str, expected: str
) -> None:
    model = load_model(tiny_model_dir, dtype)
    assert model.dtype == getattr(torch, expected)
    assert not model.training


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "o_proj")])
def test_lora_on_fused_experts_is_refused_before_training(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    """Which "all-linear" means to peft; their adapters could not be identified from."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 2}
    MixtralConfig(**sizes, **heads).save_pretrained(tmp_path)
    config = RunConfig(model=str(tmp_path), data="d", output="o", target_modules=targets)
    if targets == ("all-linear",):
        with pytest.raises(
            ValueError, match=r"has LoRA on raw parameters .*; train with target_mo"
        ):
            check_model(config, tmp_path)
    else:
        assert check_model(config, tmp_path) == "mixtral"


def test_a_run_without_a_projection_takes_an_unknown_architecture(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16, "num_attention_heads": 2}
    OPTConfig(**sizes, num_hidden_layers=1, vocab_size=16).save_pretrained(tmp_path)
    config = RunConfig(model=str(tmp_path), data="d", output="o", target_modules=("fc2",))
    assert check_model(config, tmp_path) == "opt"
    with pytest.raises(ValueError, match="'opt'"):
        check_model(replace(config, project_gradient=True), tmp_path)
