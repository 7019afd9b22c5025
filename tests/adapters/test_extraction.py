"""A merged or fully fine-tuned model -> the adapter that is nearest to the change."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen2Config

import grasp_kernels as gk
from grasp_kernels.adapters import load_adapter
from grasp_kernels.adapters.files import CONFIG, WEIGHTS
from grasp_kernels.cli import main
from grasp_kernels.models.architectures import SiteRules
from grasp_kernels.models.names import base_name
from grasp_kernels.models.weights import model_weights
from tests.helpers.models import tiny_model, tiny_peft_model, tokens
from tests.helpers.oracle import relative_error

RANK = 4  # of the adapters of tiny_peft_model
TARGETS = ("q_proj", "v_proj", "down_proj")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


@pytest.fixture
def merged() -> Any:
    return copy.deepcopy(tiny_peft_model(TARGETS, Qwen2Config)).merge_and_unload()


def fully_tuned() -> Any:
    """Every parameter of the tiny model moved by noise, about half as large as itself."""
    model = tiny_model(Qwen2Config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.5 * noise * (parameter.square().mean().sqrt() + 0.1)
    return model


@pytest.mark.parametrize("stored", [True, False])
def test_what_was_merged_comes_back(merged: Any, stored: bool, tmp_path: Path) -> None:
    """With stock peft, to what the merge has rounded; of models and of their folders."""
    adapter, base = tiny_peft_model(TARGETS, Qwen2Config), tiny_model(Qwen2Config)
    given = merged, base
    if stored:
        given = tmp_path / "merged", tmp_path / "base"
        merged.save_pretrained(given[0], max_shard_size="20KB")
        base.save_pretrained(given[1])
    found = gk.extract_adapter(*given, tmp_path / "new" / "adapter", rank=RANK)
    wanted = {base_name(name) for name, module in adapter.named_modules() if hasattr(module, "r")}
    assert found.shares.keys() == wanted and found.outside == []
    assert min(found.shares.values()) > 1 - 1e-6 < found.total <= 1.0
    config = json.loads((tmp_path / "new" / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == (str(given[1]) if stored else "")
    stock = PeftModel.from_pretrained(tiny_model(Qwen2Config), str(tmp_path / "new" / "adapter"))
    rounded = relative_error(logits(merged), logits(adapter))
    assert 0 < relative_error(logits(stock), logits(merged)) <= 4 * rounded


def spectral_norm(layer: Any) -> Tensor:
    return torch.linalg.matrix_norm(layer.scaling * layer.lora_B @ layer.lora_A, 2)


def test_its_directions_are_those_of_the_adapter(tmp_path: Path) -> None:
    """As far as bfloat16, in which models are merged, has kept them."""
    adapter = tiny_peft_model()
    adapter.save_pretrained(tmp_path / "original")
    base = tiny_model().to(torch.bfloat16)
    merged = copy.deepcopy(adapter).to(torch.bfloat16).merge_and_unload()
    gk.extract_adapter(merged, base, tmp_path / "adapter", rank=RANK)
    ours, theirs = (
        gk.identify(tmp_path / name, k=1, base_model=tiny_model()).basis
        for name in ("adapter", "original")
    )
    assert ours is not None and theirs is not None
    sine = (ours - theirs @ (theirs.mT @ ours)).norm()
    # Davis and Kahan (1970): the perturbation of the stack, whose blocks have norm 1, over the gap
    # between its first two singular values, which is 1.450 - 1.332.
    rounded = model_weights(merged)
    writers = [one for one in load_adapter(tmp_path / "original").layers if one.site]
    perturbed = sum(
        float(rounded[one.name]().float().norm() / spectral_norm(one)) ** 2 for one in writers
    )
    assert 0 < sine <= torch.finfo(torch.bfloat16).eps * perturbed**0.5 / (1.450 - 1.332)


def test_of_any_other_change_the_nearest_one_is_taken(tmp_path: Path) -> None:
    """And what is no linear layer is named."""
    base, changed = tiny_model(Qwen2Config), fully_tuned()
    found = gk.extract_adapter(changed, base, tmp_path / "adapter", rank=RANK)
    assert "model.embed_tokens" in found.outside and "model.norm" in found.outside
    assert "model.layers.0.self_attn.q_proj.bias" in found.outside
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    before, after = model_weights(base), model_weights(changed)
    kept = total = 0.0
    for name, share in found.shares.items():
        delta = after[name]().detach().double() - before[name]().detach().double()
        S = torch.linalg.svdvals(delta)
        A, B = (stored[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        # Noise has no few leading directions, so that the randomized SVD comes within a percent.
        nearest = float(S[:RANK].square().sum() / S.square().sum())
        assert 0.99 * nearest <= share <= nearest * (1 + 1e-6)
        left = float((delta - B.double() @ A.double()).square().sum() / S.square().sum())
        assert left == pytest.approx(1 - share, rel=1e-5)
        kept, total = kept + float(S[:RANK].square().sum()), total + float(S.square().sum())
    assert found.total == pytest.approx(kept / total, rel=0.01)
    assert 0.2 < found.total < 0.8


def test_a_layer_that_is_narrower_than_the_rank_comes_back_whole(tmp_path: Path) -> None:
    changed = fully_tuned()
    found = gk.extract_adapter(changed, tiny_model(Qwen2Config), tmp_path / "adapter", rank=20)
    for name, share in found.shares.items():
        assert (share > 1 - 1e-6) == name.endswith(("k_proj", "v_proj")), name
    stored = load_adapter(tmp_path / "adapter").layers
    assert {one.lora_A.shape[0] for one in stored} == {20}
    assert any(not one.lora_A[16:].any() for one in stored)  # zeros: no pattern of ranks
    assert {one.scaling for one in stored} == {1.0}
    PeftModel.from_pretrained(tiny_model(Qwen2Config), str(tmp_path / "adapter"))


def test_the_text_says_what_is_not_in_the_adapter(merged: Any, tmp_path: Path) -> None:
    base = tiny_model(Qwen2Config)
    text = gk.extract_adapter(merged, base, tmp_path / "one", rank=RANK).text()
    assert text.startswith("9 layers changed; the adapter holds 100.0% of the squared change")
    assert "Also changed" not in text
    text = gk.extract_adapter(fully_tuned(), base, tmp_path / "two", rank=RANK).text()
    assert "Also changed, but not in the adapter: lm_head, model.embed_tokens" in text


def test_a_head_that_is_not_stored_has_not_changed(tmp_path: Path) -> None:
    tied = tiny_model(Qwen2Config, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        tied.model.layers[0].self_attn.o_proj.weight += 0.1
    tied.save_pretrained(tmp_path / "changed")
    found = gk.extract_adapter(tmp_path / "changed", tied_base(), tmp_path / "adapter", rank=1)
    assert list(found.shares) == ["model.layers.0.self_attn.o_proj"] and found.outside == []


def tied_base() -> Any:
    return tiny_model(Qwen2Config, tie_word_embeddings=True)


def with_weight(model: Any, change: Any) -> Any:
    """The model with one weight replaced by what `change` makes of it."""
    layer = model.model.layers[1].self_attn.o_proj
    layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=False)
    return model


def with_other_head() -> Any:
    model = tiny_model(Qwen2Config)
    with torch.no_grad():
        model.lm_head.weight += 1
    return model


WRONG = {
    "the same model": (lambda: tiny_model(Qwen2Config), {}, "No linear layer of a"),
    "another depth": (
        lambda: tiny_model(Qwen2Config).model.layers[:2],
        {},
        "has no weight 'model.layers",
    ),
    "another width": (
        lambda: with_weight(fully_tuned(), lambda w: w[:, :-1]),
        {},
        r"'model.layers.1.self_attn.o_proj' have shapes \(32, 32\) and \(32, 31\)",
    ),
    "quantised": (
        lambda: with_weight(fully_tuned(), lambda w: w.to(torch.int8)),
        {},
        "is a (Parameter|Tensor) of torch.int8 on cpu; give models that are loaded whole",
    ),
    "in float8": (
        lambda: with_weight(fully_tuned(), lambda w: w.to(torch.float8_e4m3fn)),
        {},
        "of torch.float8_e4m3fn on cpu; give models that are loaded whole",
    ),
    "offloaded": (
        lambda: with_weight(fully_tuned(), lambda w: w.to("meta")),
        {},
        "on meta; give models that are loaded whole",
    ),
    "changed elsewhere": (
        lambda: with_other_head(),
        {},
        r"\(differences elsewhere: lm_head\)",
    ),
    "not finite": (
        lambda: with_weight(fully_tuned(), lambda w: w / 0),
        {},
        "'model.layers.1.self_attn.o_proj' has non-finite values",
    ),
    "not merged": (lambda: tiny_peft_model(TARGETS, Qwen2Config), {}, "is not merged"),
    "rank 0": (fully_tuned, {"rank": 0}, "rank is 0; choose at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_extracted_says_why(case: str, tmp_path: Path) -> None:
    make, options, sentence = WRONG[case]
    with pytest.raises(ValueError, match=sentence):
        gk.extract_adapter(make(), tiny_model(Qwen2Config), tmp_path / "adapter", **options)
    assert not list(tmp_path.iterdir())


def test_a_rounding_is_no_change(tmp_path: Path) -> None:
    """A model that was merged in bfloat16, over a base in float32."""
    base, changed = tiny_model(Qwen2Config), tiny_model(Qwen2Config)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight += 0.1
    found = gk.extract_adapter(changed.to(torch.bfloat16), base, tmp_path / "adapter", rank=RANK)
    assert list(found.shares) == ["model.layers.0.mlp.down_proj"] and found.outside == []


def test_a_head_that_was_untied_is_named(tmp_path: Path) -> None:
    changed = fully_tuned()
    tied_base().save_pretrained(tmp_path / "base")  # which stores no head
    found = gk.extract_adapter(changed, tmp_path / "base", tmp_path / "one", rank=RANK)
    assert "lm_head" in found.outside
    with torch.no_grad():
        changed.lm_head.weight.copy_(changed.model.embed_tokens.weight)
    found = gk.extract_adapter(changed, tmp_path / "base", tmp_path / "two", rank=RANK)
    assert "lm_head" not in found.outside and "model.embed_tokens" in found.outside


@pytest.mark.parametrize("key", ["quantization_config", "vision_config"])
def test_a_checkpoint_that_is_not_read_by_name_is_refused(
    key: str, merged: Any, tmp_path: Path
) -> None:
    merged.save_pretrained(tmp_path / "merged")
    path = tmp_path / "merged" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"x": 1}}))
    with pytest.raises(ValueError, match="do not hold the weights of its layers by name"):
        gk.extract_adapter(tmp_path / "merged", tiny_model(Qwen2Config), tmp_path / "adapter")


def test_files_beside_the_checkpoint_are_not_read(merged: Any, tmp_path: Path) -> None:
    base = tiny_model(Qwen2Config)
    merged.save_pretrained(tmp_path / "merged", max_shard_size="20KB")
    base.save_pretrained(tmp_path / "base")
    stored = tmp_path / "base" / "model.safetensors"
    (tmp_path / "merged" / "old-model.safetensors").write_bytes(stored.read_bytes())
    found = gk.extract_adapter(tmp_path / "merged", base, tmp_path / "adapter", rank=RANK)
    assert len(found.shares) == 9


def test_an_unknown_architecture_needs_sites(merged: Any, tmp_path: Path) -> None:
    class Odd(LlamaConfig):
        model_type = "odd"

    base = tiny_model(Qwen2Config)
    base.config, merged.config = Odd(), Odd()
    with pytest.raises(ValueError, match=r"are not known; .*declare them with sites"):
        gk.extract_adapter(merged, base, tmp_path / "adapter")
    sites = SiteRules(writers=("mlp.down_proj",), blocks="model.layers")
    found = gk.extract_adapter(merged, base, tmp_path / "adapter", rank=RANK, sites=sites)
    assert {name.rpartition(".")[2] for name in found.shares} >= {"down_proj", "v_proj"}


def test_files_that_are_there_are_kept(merged: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(FileExistsError, match="choose another path"):
        gk.extract_adapter(merged, tiny_model(Qwen2Config), tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="There are no weights in"):
        gk.extract_adapter(tmp_path / "adapter", tiny_model(Qwen2Config), tmp_path / "new")
    tiny_peft_model(TARGETS, Qwen2Config).save_pretrained(tmp_path / "finished")
    with pytest.raises(ValueError, match="is an adapter, not a model"):
        gk.extract_adapter(tmp_path / "finished", tiny_model(Qwen2Config), tmp_path / "new")


def test_the_command_line_goes_from_a_merged_model_to_a_subspace(
    merged: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged.save_pretrained(tmp_path / "merged")
    tiny_model(Qwen2Config).save_pretrained(tmp_path / "base")
    out = str(tmp_path / "subspace.safetensors")
    assert main(["identify", str(tmp_path / "merged"), "--output", out]) == 2
    said = capsys.readouterr().err
    assert "is a whole model; extract an adapter from it first: grasp-kernels extract" in said
    extract = ["extract", str(tmp_path / "merged"), "--base-model", str(tmp_path / "base")]
    extract += ["--output", str(tmp_path / "adapter"), "--rank"]
    assert main([*extract, "0"]) == 2
    assert "rank is 0; choose at least 1" in capsys.readouterr().err
    assert main([*extract, str(RANK)]) == 0
    assert "9 layers changed" in capsys.readouterr().out
    assert main(["identify", str(tmp_path / "adapter"), "--k", "1", "--output", out]) == 0
    assert gk.Subspace.load(out).k >= 1


def test_a_folder_of_other_tensors_is_no_model(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no weight "):
        gk.extract_adapter(tmp_path, tiny_model(Qwen2Config), tmp_path / "adapter")
