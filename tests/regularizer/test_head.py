"""The divergence from the inputs of the head, and the heads that take the logits instead."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    RecurrentGemmaConfig,
)

import grasp_kernels as gk
from grasp_kernels.regularizer import head as heads
from grasp_kernels.regularizer import kl
from grasp_kernels.regularizer.head import LinearHead
from tests.helpers.models import SIZES, tiny_model, tiny_peft_model
from tests.helpers.oracle import budget, relative_error

GEMMA = {"head_dim": 8, "final_logit_softcapping": 2.0}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of each fused divergence."""
    found: list[int] = []

    def counted(hidden: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        found.append(len(hidden))
        return gk.fused_linear_kl(hidden, *args, **options)

    monkeypatch.setattr(kl, "fused_linear_kl", counted)
    return found


def regularizer(model: Any, kept: float = 0.7) -> gk.KLRegularizer:
    torch.manual_seed(0)
    documents = torch.randint(5, 32, (6, 8))
    counted = torch.rand(6, 8) < kept
    counted[0] = True
    return gk.KLRegularizer.of(model, documents, counted, kl_coef=1.0, batch_size=4)


def measured(model: Any, found: gk.KLRegularizer, step: int = 1) -> list[torch.Tensor]:
    """The loss and the gradients of the adapter."""
    learned = [p for p in model.parameters() if p.requires_grad]
    loss = found.loss(model, step)
    return [loss.detach(), *torch.autograd.grad(loss, learned)]


@pytest.mark.parametrize(
    ("config", "options"),
    [(LlamaConfig, {}), (LlamaConfig, {"tie_word_embeddings": True}), (Gemma2Config, GEMMA)],
)
def test_a_linear_head_gives_what_its_logits_give(
    config: type, options: dict[str, Any], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _peft(config, options)
    monkeypatch.setattr(kl, "_LIKELY", 9)
    found = regularizer(model)
    fused = measured(model, found)
    assert len(calls) == 1
    assert calls[0] > 4
    monkeypatch.setattr(LinearHead, "of", lambda model: None)
    for ours, plain in zip(fused, measured(model, found), strict=True):
        torch.testing.assert_close(ours, plain)
    assert len(calls) == 1


SCALED = [(GraniteConfig, {"logits_scaling": 8.0}), (CohereConfig, {"logit_scale": 0.0625})]


@pytest.mark.parametrize(
    ("config", "options"),
    [*SCALED, (RecurrentGemmaConfig, {"logits_soft_cap": 2.0, "num_hidden_layers": 1})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_behind_a_head_is_seen_in_a_fresh_model(
    config: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Its logits are small, and those of the padding token are 0."""
    model = AutoModelForCausalLM.from_config(config(**{**SIZES, "pad_token_id": 0, **options}))
    assert LinearHead.of(model.to(dtype)) is None
    plain = LlamaConfig(**SIZES, pad_token_id=0)
    assert LinearHead.of(AutoModelForCausalLM.from_config(plain).to(dtype)) is not None


def test_a_small_scale_is_seen_in_bfloat16() -> None:
    config = GraniteConfig(**SIZES, logits_scaling=1.02)
    assert LinearHead.of(AutoModelForCausalLM.from_config(config).bfloat16()) is None


def test_models_that_share_a_head_are_told_apart() -> None:
    llama, granite = (
        AutoModelForCausalLM.from_config(config)
        for config in (LlamaConfig(**SIZES), GraniteConfig(**SIZES, logits_scaling=8.0))
    )
    granite.lm_head = llama.lm_head
    assert LinearHead.of(llama) is not None
    assert LinearHead.of(granite) is None
    llama.lm_head = nn.Linear(32, 64, bias=False)
    assert LinearHead.of(llama) is not None


def test_a_part_that_was_compiled_before_is_told() -> None:
    model = tiny_peft_model()
    found = regularizer(model)
    found.loss(model, 1)
    inner: Any = model.get_base_model()
    inner.forward = lambda **_: SimpleNamespace(logits=torch.zeros(1, 64))  # calls no head
    with pytest.raises(RuntimeError, match="left out the hook on its head"):
        found.loss(model, 1)


@pytest.mark.parametrize(("config", "options"), SCALED)
def test_scales_behind_a_head_are_noticed(
    config: type, options: dict[str, Any], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _peft(config, options)
    found = regularizer(model)
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    ours = measured(model, found)
    measured(model, found)
    assert calls == []
    assert len(runs) == 3  # the first one looked
    monkeypatch.setattr(LinearHead, "of", lambda model: None)
    assert all(map(torch.equal, ours, measured(model, found)))


def test_a_draw_without_a_position_is_no_loss(calls: list[int]) -> None:
    model = tiny_peft_model()
    found = regularizer(model, kept=0.0)  # the first of six documents counts alone
    losses = [found.loss(model, step) for step in range(40)]
    assert any(loss == 0 for loss in losses)
    assert all(loss.isfinite() for loss in losses)
    next(loss for loss in losses if loss == 0).backward()
    assert any(calls)


@pytest.mark.parametrize("config", [LlamaConfig, GraniteConfig])
def test_looking_at_a_head_draws_nothing(config: type) -> None:
    """Or a training that is resumed would have other masks of dropout than one that is not."""
    options = {"logits_scaling": 8.0} if config is GraniteConfig else {}
    model = tiny_peft_model(config_class=_with(config, options), lora_dropout=0.5).train()
    found = regularizer(model)
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(found.loss(model, 1))
    assert torch.equal(*losses)
    assert model.training


def test_autocast_of_the_model_alone(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate has it: the forward is in bfloat16, and the loss outside of autocast."""
    model = tiny_peft_model()
    found, plain = regularizer(model), model.forward
    with monkeypatch.context() as without:
        without.setattr(LinearHead, "of", lambda model: None)
        exact = measured(model, found)  # in float32

    def forward(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(*args, **options)

    monkeypatch.setattr(model, "forward", forward)
    fused = measured(model, found)
    assert len(calls) == 1
    monkeypatch.setattr(LinearHead, "of", lambda model: None)
    for ours, logits, meant in zip(fused, measured(model, found), exact, strict=True):
        stock = relative_error(logits, meant)
        assert relative_error(ours, meant) <= budget(stock, torch.bfloat16, logits.numel())


def _peft(config: type, options: dict[str, Any]) -> PeftModel:
    return tiny_peft_model(("q_proj", "down_proj"), config_class=_with(config, options))


def _with(config: type, options: dict[str, Any]) -> Any:
    return lambda **sizes: config(**sizes, **options)


def _hooked(model: PeftModel) -> None:
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output * 2)


def _replaced(model: PeftModel) -> None:
    head = model.get_output_embeddings()
    stock = head.forward
    head.forward = lambda x: stock(x) * 2


def _adapted(model: PeftModel) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["lm_head"])
    return get_peft_model(model.get_base_model(), config)


def _saved(model: PeftModel) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return get_peft_model(tiny_model(), config)


@pytest.mark.parametrize(
    "change",
    [_hooked, _replaced, _adapted, _saved, lambda model: torch.compile(model, backend="eager")],
)
def test_heads_that_are_more_than_a_weight(change: Callable[[PeftModel], Any]) -> None:
    model = tiny_peft_model()
    assert isinstance(LinearHead.of(model), LinearHead)
    changed = change(model)
    assert LinearHead.of(model if changed is None else changed) is None


def test_a_head_is_forgotten_with_its_model() -> None:
    model = tiny_peft_model()
    before = len(heads._known)
    regularizer(model).loss(model, 0)
    assert len(heads._known) == before + 1
    del model
    assert len(heads._known) == before


def test_wrapped_models() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = tiny_peft_model()
    head = LinearHead.of(Wrapper(model))
    assert head is not None
    assert head.weight is model.get_output_embeddings().weight
