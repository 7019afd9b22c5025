"""Compilation, and the calls that come between two steps of a training: none of them changes it.

Parity of the features of a training is in test_training_features.py.
"""

import copy
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import grasp_kernels as gk
from tests.helpers.comparisons import (
    assert_same_gradients,
    assert_same_logits,
    logits,
    loss_and_gradients,
)
from tests.helpers.models import a_subspace, randomise_adapter, tiny_model, tokens
from tests.helpers.oracle import orthonormal
from tests.helpers.parity import (
    SOME,
    STEPS,
    assert_parity,
    batches,
    check_parity,
    lora_model,
    qwen,
    train,
    two_adapters,
)


@pytest.fixture(autouse=True)
def forgetful_compiler() -> Iterator[None]:
    """A length that another test has compiled would make the next one dynamic, and slow."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_whole_model_compiled_into_one_graph_trains_as_stock_peft() -> None:
    def make() -> PeftModel:
        base = tiny_model()
        base.model.layers = base.model.layers[:1]
        config = LoraConfig(r=16, lora_alpha=16, target_modules=list(SOME), lora_dropout=0.1)
        model = get_peft_model(base, config)
        randomise_adapter(model)
        return model

    ours = make()
    gk.apply_grasp(ours)
    counter = CompileCounterWithBackend("aot_eager")
    found = train(torch.compile(ours, fullgraph=True, backend=counter), lengths=1)
    assert counter.frame_count == 1
    # The compiler draws the masks, and the same for all of them.
    stock, exact = (torch.compile(m, backend="aot_eager") for m in (make(), make().double()))
    assert_parity(found, train(stock, lengths=1), train(exact, lengths=1))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lengths_do_not_compile_again_and_again(dropout: float) -> None:
    """The first length, then any length. (A whole model in transformers 5 does the same.)"""
    model = lora_model(lora_dropout=dropout)
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    block = model.get_base_model().model.layers[0].mlp.train()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(block, fullgraph=True, backend=counter)
    trained = [p for p in block.parameters() if p.requires_grad]
    for T in (5, 9, 16, 33, 7):
        x = torch.randn(2, T, 32, requires_grad=True)
        results = []
        for call in (block, run):
            torch.manual_seed(T)
            y = call(x)
            results.append([y, *torch.autograd.grad(y.square().mean(), [x, *trained])])
        for found, expected in zip(*results, strict=True) if dropout == 0.0 else ():
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 2


def test_compiled_checkpoints_draw_the_mask_again() -> None:
    model = lora_model(lora_dropout=0.3)
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    block = model.get_base_model().model.layers[0].mlp.train()
    trained = [p for p in block.parameters() if p.requires_grad]
    plain = torch.compile(block, fullgraph=True, backend="aot_eager")
    run = torch.compile(
        lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(2, 7, 32, requires_grad=True)
    results = []
    for call in (plain, run):
        torch.manual_seed(5)
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().mean(), [x, *trained])])
    assert all(map(torch.equal, *results))


def closable_layer() -> gk.GraspLoRALinear:
    """A layer whose B is open, as an optimizer leaves it."""
    basis = orthonormal(20, 2, torch.Generator().manual_seed(0))
    layer = gk.GraspLoRALinear.from_linear(nn.Linear(24, 20), write_basis=basis)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def test_compiled_code_sees_that_a_base_weight_changed() -> None:
    layer = closable_layer()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def gradient(call: Any) -> Tensor:
        x = torch.ones(3, 24, requires_grad=True)
        call(x).square().sum().backward()
        return x.grad

    gradient(layer)
    gradient(run)
    with torch.no_grad():
        layer.base_layer.weight.mul_(-0.5)
    torch.testing.assert_close(gradient(run), gradient(layer))


def test_a_compiled_layer_can_do_without_its_adapter() -> None:
    layer = closable_layer()
    layer.enable_adapters(False)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24)
    assert torch.equal(run(x), layer.base_layer(x))


# --- what happens between steps


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        logits(model)
    model.train()


def without_gradients(model: nn.Module) -> None:
    logits(model)
    model.train()


def reference_model(model: Any) -> None:
    """What preference training does: the same model without its adapter."""
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=tokens())


def generation(model: Any) -> None:
    model.eval().generate(input_ids=tokens(1, 3), max_new_tokens=3, do_sample=False)
    model.train()


def a_closed_model(seed: int = 1) -> PeftModel:
    model = lora_model(target_modules=list(SOME))
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    randomise_adapter(model, seed)
    return model


@pytest.mark.parametrize(
    "call", [in_inference_mode, without_gradients, reference_model, generation]
)
def test_forwards_before_and_between_change_nothing(call: Any) -> None:
    """Before the first step, and between every forward and its backward."""
    undisturbed, disturbed = train(a_closed_model(), steps=4), a_closed_model()
    call(disturbed)
    found = train(disturbed, steps=4, between=call)
    assert found.losses == undisturbed.losses
    assert all(map(torch.equal, found.gradients, undisturbed.gradients))


@pytest.mark.parametrize("call", [lambda m: m.state_dict(), gk.leakage])
def test_closing_between_forward_and_backward_changes_rounding_alone(call: Any) -> None:
    undisturbed, found = (
        train(a_closed_model(), steps=4),
        train(a_closed_model(), steps=4, between=call),
    )
    torch.testing.assert_close(found.losses, undisturbed.losses, rtol=1e-6, atol=0.0)
    for one, other in zip(found.gradients, undisturbed.gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.slow  # the kernels
def test_factors_made_in_inference_mode_serve_a_training_step() -> None:
    """The kernels' factors of all layers come out of one launch, that of the first layer."""
    model = lora_model(target_modules=["q_proj"], r=4)
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model), backend="triton"))
    first, second = (block.self_attn.q_proj for block in model.get_base_model().model.layers)
    x = torch.randn(3, 32)
    with torch.inference_mode():
        for layer in (first, second, first):
            layer(x)
    second(x.requires_grad_()).sum().backward()
    assert second.lora_B["default"].weight.grad is not None


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = lora_model(target_modules=list(SOME))
        expected = logits(model)
        gk.apply_grasp(model)
        assert_same_logits(logits(model), expected, lora_model(target_modules=list(SOME)))
        gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
        logits(model)


def test_a_retained_graph_gives_the_same_again() -> None:
    model = a_closed_model()
    _, once = loss_and_gradients(model)
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    for _ in range(2):
        loss.backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        assert name not in once or torch.equal(parameter.grad, 2 * once[name]), name


def test_a_trained_base_weight_gets_its_gradient() -> None:
    def make() -> PeftModel:
        model = lora_model(target_modules=list(SOME))
        model.get_base_model().model.layers[0].mlp.down_proj.base_layer.requires_grad_(True)
        return model

    ours, toggled = make(), lora_model(target_modules=list(SOME))
    _, expected = loss_and_gradients(make())
    with pytest.warns(UserWarning, match=r"1 of 6.*\(the base weight is trained too\)"):
        gk.apply_grasp(ours)
    assert_same_gradients(loss_and_gradients(ours)[1], expected)
    gk.apply_grasp(toggled)
    toggled.get_base_model().model.layers[0].mlp.down_proj.base_layer.requires_grad_(True)
    with pytest.warns(UserWarning, match="not accelerated: the base weight is trained too"):
        assert_same_gradients(loss_and_gradients(toggled)[1], expected)


def test_what_is_not_accelerated_is_said_once() -> None:
    model = two_adapters()
    gk.apply_grasp(model)
    model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="not accelerated: 2 active adapters") as told:
        logits(model)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model)
        model.base_model.set_adapter("other")  # which the writers do not have
        logits(model)
        with model.disable_adapter():
            logits(model)
        model.merge_adapter()
        logits(model)


# --- other devices, dtypes and copies


def test_casting_back_and_forth_keeps_what_is_projected() -> None:
    model = lora_model(target_modules=list(SOME))
    subspace = a_subspace(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model.to(dtype)
        loss_and_gradients(model)
    # The frequencies of the rotary embedding are rounded, too.
    other = lora_model(target_modules=list(SOME)).half().bfloat16().float()
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            theirs.copy_(ours)
    gk.apply_grasp(other, gk.GraspConfig(subspace=subspace))
    assert_same_gradients(loss_and_gradients(model)[1], loss_and_gradients(other)[1])


def test_emptied_models_keep_their_bases() -> None:
    model = a_closed_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    _, expected = loss_and_gradients(model)
    model.to_empty(device="cpu").load_state_dict(weights)
    model.model.model.rotary_emb.__init__(model.config)  # a buffer that no checkpoint has either
    assert_same_gradients(loss_and_gradients(model)[1], expected)


def test_copies_are_independent(tmp_path: Path) -> None:
    """Also of the hooks on writers that have no adapter (`o_proj` here)."""
    model = lora_model(target_modules=["q_proj", "down_proj"])
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    _, expected = loss_and_gradients(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert_same_gradients(loss_and_gradients(other)[1], expected)
        gk.remove_grasp(other)
        assert not any(m._forward_hooks for m in other.modules())
    assert_same_gradients(loss_and_gradients(model)[1], expected)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert (
        torch.load(tmp_path / "weights.pt", weights_only=True).keys() == model.state_dict().keys()
    )


# --- loading and going on


def saved_adapter(folder: Path) -> Path:
    lora_model().save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_trains_on(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    folder = saved_adapter(tmp_path)

    def make() -> nn.Module:
        options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
        return PeftModel.from_pretrained(qwen(), folder, **options)

    check_parity(make)


def test_layers_may_be_replaced_before_their_weights_come() -> None:
    """A model without data, then its weights: the bases are those of the subspace."""
    loaded = lora_model(target_modules=list(SOME))
    subspace = a_subspace(loaded)
    with torch.device("meta"):
        empty = get_peft_model(
            qwen(),
            LoraConfig(r=16, lora_alpha=16, target_modules=list(SOME)),
            low_cpu_mem_usage=True,
        )
    gk.apply_grasp(empty, gk.GraspConfig(subspace=subspace))
    for module in (empty, loaded):
        assert not module.load_state_dict(loaded.state_dict(), assign=True).missing_keys
    gk.apply_grasp(loaded, gk.GraspConfig(subspace=subspace))
    x = torch.randn(3, 48)
    for name, layer in loaded.named_modules():
        if name.endswith("down_proj"):
            torch.testing.assert_close(empty.get_submodule(name)(x), layer(x))


def test_an_adapter_loaded_over_another_one(tmp_path: Path) -> None:
    model = lora_model()
    gk.apply_grasp(model)
    saved = saved_adapter(tmp_path)
    randomise_adapter(model, seed=9)
    model.load_adapter(saved, "default", is_trainable=True)
    model.load_adapter(saved, "second")
    for name in ("default", "second"):
        model.set_adapter(name)
        stock = lora_model()
        assert_same_logits(logits(model), logits(stock), stock)


def test_part_of_the_pretrained_weights_in_the_adapter_is_not_closed_away() -> None:
    model = lora_model(init_lora_weights="pissa")
    with pytest.raises(
        ValueError, match=r"'default' was initialised with 'pissa'.*orthogonal=False"
    ):
        gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    stock = copy.deepcopy(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model), orthogonal=False))
    assert_same_logits(logits(model), logits(stock), stock)


def trainer(folder: Path, projected: bool) -> Trainer:
    """Of transformers, with AdamW, dropout and a checkpoint after 10 of 20 steps."""
    model = lora_model(target_modules=list(SOME), lora_dropout=0.1 if projected else 0.0)
    if projected:
        gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    ids = [row for batch in batches(8) for row in batch[:, :5]]
    options = {"save_steps": 10, "save_total_limit": 3, "logging_steps": 1}
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, use_cpu=True, report_to="none", disable_tqdm=True, **options
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=arguments, train_dataset=data)


@pytest.mark.slow
def test_trainer_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = trainer(tmp_path, projected=True)
    whole.train()
    resumed = trainer(tmp_path / "resumed", projected=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(other[name], value), name


@pytest.mark.slow
def test_trainer_loses_as_with_stock_peft(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / name, projected=False) for name in ("ours", "stock")]
    gk.apply_grasp(runs[0].model)
    for run in runs:
        run.train()
    found, expected = (
        [entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs
    )
    assert len(expected) == STEPS
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)
