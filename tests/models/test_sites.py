"""Names of modules -> writers and the norms after them."""

import pytest
import torch
from torch import nn
from transformers import Olmo2Config

from grasp_kernels.models.architectures import (
    RULES,
    Site,
    SiteRules,
    model_gains,
    model_sites,
    site_rules,
)
from grasp_kernels.models.names import base_name
from tests.helpers.models import tiny_model, tiny_peft_model

LLAMA = RULES["llama"]


@pytest.mark.parametrize("stem", ["layers", "model.layers", "base.decoder.layers"])
def test_writers_are_sites_and_other_linears_of_a_block_are_not(stem: str) -> None:
    writer, reader = f"{stem}.11.mlp.down_proj", f"{stem}.2.self_attn.v_proj"
    assert LLAMA.site(writer) == Site(writer, None)
    assert LLAMA.site(reader) is None
    assert LLAMA.split(reader) == (stem, 2, "self_attn.v_proj")


@pytest.mark.parametrize(
    "name",
    ["lm_head", "model.embed_tokens", "model.layers.0.self_attn", "model.blocks.0.mlp.down_proj"],
)
def test_other_modules_are_no_sites(name: str) -> None:
    assert LLAMA.site(name) is None


def test_blocks_may_have_another_name() -> None:
    rules = SiteRules(writers=("mlp.out",), blocks="h")
    assert rules.site("transformer.h.3.mlp.out") == Site("transformer.h.3.mlp.out", None)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_known_model_types(model_type: str) -> None:
    assert site_rules(model_type, []) is LLAMA


def test_the_norm_after_a_writer_is_where_the_stream_is() -> None:
    rules = RULES["gemma2"]
    writer = rules.site("model.layers.1.mlp.down_proj")
    norm = rules.site("model.layers.1.post_feedforward_layernorm")
    assert writer is not None and norm is not None
    assert (writer.norm, norm.norm) == (norm.name, None)


def test_a_site_knows_what_its_norm_does_to_directions() -> None:
    D, g = 6, torch.Generator().manual_seed(0)
    weight, directions = torch.rand(D, generator=g), torch.randn(D, 2, generator=g)
    for kind, matrix in (("rms", weight.diag()), ("rms1p", (1 + weight).diag())):
        site = Site("a", "norm", kind)
        gain = site.gain(weight)
        torch.testing.assert_close(site.scaled(directions, gain), matrix @ directions)
        bare = Site("a", None, kind)
        assert bare.scaled(directions, None) is directions


def test_text_models_of_a_family_with_images_are_told_by_their_names() -> None:
    assert site_rules("gemma3", ["model.layers.0.mlp.up_proj"]) is RULES["gemma3_text"]
    assert site_rules("gemma3", ["model.language_model.layers.0.x"]) is RULES["gemma3"]
    name = "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    assert RULES["gemma3"].site(name) is None


def test_an_unknown_type_is_judged_by_its_names() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    assert site_rules(None, names) is LLAMA
    with pytest.raises(ValueError, match=r"type None \(modules \['attn.out'.*SiteRules\("):
        site_rules(None, [*names, "transformer.h.0.attn.out"])


def test_a_known_name_does_not_make_an_unknown_type_known() -> None:
    with pytest.raises(ValueError, match=r"'gemma9' \(modules \['mlp.down_proj'\].*SiteRules\("):
        site_rules("gemma9", ["model.layers.0.mlp.down_proj"])


def test_the_rules_of_the_caller_win() -> None:
    rules = SiteRules(writers=("a",))
    assert site_rules("gemma9", ["x"], rules) is rules


def test_rules_are_checked() -> None:
    with pytest.raises(TypeError, match="tuple of names"):
        SiteRules(writers="self_attn.o_proj")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"outputs=\{'a': 'norm'\}; give each as a tuple"):
        SiteRules(writers=(), outputs={"a": "norm"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norms='batch'; use one of"):
        SiteRules(writers=("a",), norms="batch")


def test_base_name_removes_what_peft_adds() -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer"
    assert base_name(name) == "model.layers.0.mlp.up_proj"
    assert base_name("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"


def test_model_sites_are_the_same_with_and_without_peft() -> None:
    plain, wrapped = model_sites(tiny_model()), model_sites(tiny_peft_model(("o_proj", "q_proj")))
    assert plain == wrapped
    assert len(plain) == 3 * 2


def test_gains_are_those_of_the_norm_after_each_writer() -> None:
    model = tiny_model(Olmo2Config)
    gains = model_gains(model, model_sites(model))
    assert len(gains) == 6
    norm = model.model.layers[1].post_feedforward_layernorm
    assert gains["model.layers.1.post_feedforward_layernorm"].equal(norm.weight)
    assert model_gains(tiny_model(), model_sites(tiny_model())) == {}


def test_a_foreign_model_needs_rules() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(ValueError, match="declare them with sites"):
        model_sites(Foreign())
