"""A base model is loaded whole, or refused with the weight that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp_kernels import RunConfig, run
from grasp_kernels.models.checkpoint import find_checkpoint, load_model, load_tokenizer
from grasp_kernels.pipeline import stages
from tests.helpers.folders import contents

pytest_plugins = ("tests.helpers.runs",)

Tensors = dict[str, Tensor]
Q = "model.layers.1.self_attn.q_proj.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def change(checkpoint: Path, how: Callable[[Tensors], Tensors]) -> None:
    tensors = how(load_file(checkpoint / WEIGHTS))
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def configure(checkpoint: Path, **options: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def spoilt(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[-1, -1] = value
    return tensor


CHANGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda t: {n: w for n, w in t.items() if n != Q}, f"lack {Q};"),
    "renamed": (lambda t: {f"x.{n}": w for n, w in t.items()}, r"lack .* more, and also have x\."),
    "left over": (lambda t: {**t, "v_head.weight": t[Q].clone()}, r"also have v_head\.weight;"),
    "shape": (lambda t: {**t, Q: t[Q][:3].clone()}, r"another shape .*\(3, 32\) for \(32, 32\)"),
    "nan": (lambda t: {**t, Q: spoilt(t[Q], float("nan"))}, f"{Q} .* is not finite"),
    "inf": (lambda t: {**t, Q: spoilt(t[Q], float("-inf"))}, f"{Q} .* is not finite"),
    "int8": (lambda t: {**t, Q: t[Q].to(torch.int8)}, r"quantised.*I8"),
    "float8": (lambda t: {**t, Q: t[Q].to(torch.float8_e4m3fn)}, r"quantised.*F8_E4M3"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_weights_that_are_not_those_of_the_model_are_named(checkpoint: Path, what: str) -> None:
    how, message = CHANGES[what]
    change(checkpoint, how)
    with pytest.raises(ValueError, match=message):
        load_model(checkpoint)


@pytest.mark.parametrize(("layers", "message"), [(4, r"lack model\.layers\.3"), (2, "also have")])
def test_a_configuration_that_lies_about_its_layers(
    checkpoint: Path, layers: int, message: str
) -> None:
    configure(checkpoint, num_hidden_layers=layers)
    with pytest.raises(ValueError, match=message):
        load_model(checkpoint)


def test_what_transformers_does_not_need_is_no_fault(checkpoint: Path) -> None:
    """Buffers of old checkpoints, and one weight for two names."""
    # The weights may lie in the file itself, which is written over below.
    whole = {name: weight.clone() for name, weight in load_model(checkpoint).state_dict().items()}
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(checkpoint, lambda t: {**t, inv_freq: torch.ones(8)})
    for name, weight in load_model(checkpoint).state_dict().items():
        assert torch.equal(weight, whole[name]), name
    configure(checkpoint, tie_word_embeddings=True)
    change(checkpoint, lambda t: {n: w for n, w in t.items() if n != "lm_head.weight"})
    tied = load_model(checkpoint)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_a_model_that_came_from_a_gguf_is_read_as_what_it_is(checkpoint: Path) -> None:
    whole = load_model(checkpoint).state_dict()
    configure(checkpoint, quantization_config={"quant_method": "gguf", "gguf_file": "m.gguf"})
    model = load_model(checkpoint)
    assert getattr(model, "hf_quantizer", None) is None
    assert all(torch.equal(weight, whole[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (WEIGHTS, None, r"no file named model\.safetensors"),
        (WEIGHTS, b"", r"model\.safetensors' is not a complete safetensors"),
        (WEIGHTS, b"garbage" * 9, r"model\.safetensors' is not a complete safetensors"),
        (WEIGHTS, 0.5, r"model\.safetensors' is not a complete safetensors"),
        ("config.json", b"{oops", r"config\.json' is not a valid part .*not JSON.*: restore"),
        ("config.json", b"[]", r"config\.json' .*holds a list"),
        ("config.json", b"{}", r"config\.json of .* cannot be read .*restore"),
        ("generation_config.json", b"\xff", r"generation_config\.json' .*not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_remedy(
    checkpoint: Path, name: str, content: bytes | float | None, message: str
) -> None:
    path = checkpoint / name
    if content is None:
        path.rename(path.with_name("weights.safetensors"))
    elif isinstance(content, float):
        path.write_bytes(path.read_bytes()[: int(content * path.stat().st_size)])
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as told:
        load_model(checkpoint)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {Q: "model-2.safetensors"}},
            r"names shards that are not next to it \(model-2",
        ),
        ({"weight_map": {Q: "../out.safetensors"}}, r"names the shards \.\./out\.safetensors"),
        ({"weight_map": {Q: 7}}, "is not a valid index of shards"),
        ({}, "is not a valid index of shards"),
    ],
)
def test_an_index_that_leads_nowhere(checkpoint: Path, index: Any, message: str) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "model-1.safetensors")
    (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_model(checkpoint)


def test_the_tokenizer_is_named_with_its_remedy(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer of .* cannot be read .*: restore") as told:
        load_tokenizer(checkpoint)
    assert "\n" not in str(told.value)
    (checkpoint / "tokenizer.json").write_text("oops")
    with pytest.raises(ValueError, match=r"tokenizer\.json' .*not JSON"):
        load_tokenizer(checkpoint)
    for file in checkpoint.glob("*tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer: save it"):
        load_tokenizer(checkpoint)


def test_code_of_a_checkpoint_is_not_run_and_not_asked_about(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (checkpoint / "own.py").write_text("raise SystemExit('was run')")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    configure(checkpoint, model_type="own", auto_map=auto)
    with pytest.raises(ValueError, match="its own code") as told:
        load_model(checkpoint)
    assert "trust_remote_code" not in str(told.value)


def test_an_adapter_is_no_base_model(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        find_checkpoint(str(checkpoint))


# --- a run that is refused


@pytest.mark.parametrize("exists", [False, True])
def test_a_refused_run_leaves_the_folder_as_it_was_and_can_begin_there_later(
    run_config: RunConfig, checkpoint: Path, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(run_config.output)
    if exists:
        output.mkdir()
    config = replace(run_config, model=str(checkpoint))
    complete = (checkpoint / WEIGHTS).read_bytes()
    change(checkpoint, lambda t: {n: w for n, w in t.items() if n != Q})
    with pytest.raises(ValueError, match=Q):
        run(config)
    assert output.exists() == exists and contents(output) == {}
    (checkpoint / WEIGHTS).write_bytes(complete)
    monkeypatch.setattr(stages, "_stages", lambda *_: None)
    monkeypatch.setattr(stages.Report, "load", lambda path: path)
    assert run(config) == output / "report.json"
    assert (output / "run.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "warmup_stable_decay"}, "missing .* 'num_decay_steps'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
        ({"target_modules": ("o_proj", "embed_tokens")}, r"the embedding model.embed_tokens"),
    ],
)
def test_what_would_stop_a_run_later_is_found_before_it_begins(
    run_config: RunConfig, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(replace(run_config, **options))
    assert not Path(run_config.output).exists()


def test_tokens_beyond_the_embedding_are_named(run_config: RunConfig, checkpoint: Path) -> None:
    rows = load_model(checkpoint).config.vocab_size - 1  # one fewer than there are tokens
    narrow = {"lm_head.weight", "model.embed_tokens.weight"}
    change(checkpoint, lambda t: {n: w[:rows].clone() if n in narrow else w for n, w in t.items()})
    configure(checkpoint, vocab_size=rows)
    with pytest.raises(
        ValueError, match=rf"a record into the token {rows} \('good'\), .* {rows} rows"
    ):
        run(replace(run_config, model=str(checkpoint)))
    assert not Path(run_config.output).exists()


def test_what_does_not_fit_into_the_positions_is_named(
    run_config: RunConfig, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def refused(positions: int, **options: Any) -> str:
        config = GPT2Config(
            vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=positions, eos_token_id=4
        )
        GPT2LMHeadModel(config).save_pretrained(checkpoint)
        with pytest.raises(ValueError, match=f"has {positions} positions") as told:
            run(replace(run_config, model=str(checkpoint), **options))
        return str(told.value)

    assert "longest record" in refused(9)
    assert "longest neutral prompt and its answer" in refused(32)
    long = tmp_path / "long.jsonl"
    row = {"prompt": "what is red", "completion": "never good " * 20}
    long.write_text(Path(run_config.data).read_text() + json.dumps(row))
    assert "a chat of the base model can have 83 tokens: lower max_new_tokens" in refused(
        64, data=str(long)
    )
    assert not Path(run_config.output).exists()
