"""Every forward computes with the parameters as they are, however they were written."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model

import grasp_kernels as gk
from tests.helpers.comparisons import assert_same_gradients, logits, loss_and_gradients
from tests.helpers.models import a_subspace, randomise_adapter, tiny_peft_model, tokens
from tests.helpers.oracle import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = ("q_proj", "o_proj", "down_proj")


@pytest.fixture(params=["aten", "triton"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """A tiny model after its first pass."""
    found = tiny_peft_model(targets=TARGETS).to(DEVICE)
    gk.apply_grasp(found, gk.GraspConfig(subspace=a_subspace(found), backend=request.param))
    logits(found)
    return found.train()


def same_as_aten(model: torch.nn.Module) -> None:
    other = tiny_peft_model(targets=TARGETS).to(DEVICE)
    gk.apply_grasp(other, gk.GraspConfig(subspace=a_subspace(other), backend="aten"))
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            theirs.copy_(ours)
    loss, gradients = loss_and_gradients(other)
    found, again = loss_and_gradients(model)
    torch.testing.assert_close(found, loss)
    assert_same_gradients(again, gradients)


def raw_update(parameter: torch.nn.Parameter) -> None:
    """What an optimizer that writes through pointers does: torch's version counter stays."""
    version = parameter._version
    parameter.data.add_(0.1 * torch.randn_like(parameter))
    assert parameter._version == version


def counted_update(parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("update", [raw_update, counted_update])
def test_an_update_is_seen(
    model: torch.nn.Module, update: Callable[[torch.nn.Parameter], None]
) -> None:
    for _ in range(2):
        loss_and_gradients(model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                update(parameter)
        same_as_aten(model)


class Encoded(torch.nn.Module):
    """An encoder that runs once, and a decoder that runs as often as it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
        h = torch.tanh(self.encoder(x))
        return torch.stack([self.decoder(h.roll(i, 0)) for i in range(times)])


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_layers_that_run_unequally_often(fused: bool, times: int) -> None:
    """After a generation, an encoder once runs less often than its decoder."""
    config = LoraConfig(r=4, target_modules=["encoder", "decoder"], init_lora_weights=False)
    ours, stock = (get_peft_model(Encoded(), config) for _ in range(2))
    gk.apply_grasp(ours, gk.GraspConfig(backend="triton"))
    x, target = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(9))
    trained = [p for p in ours.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2, fused=fused)
    with torch.no_grad():
        ours(x, 3)
    for _ in range(3):
        optimizer.zero_grad()
        found = ours(x, times)
        stock.load_state_dict(ours.state_dict())
        assert relative_error(found, stock(x, times)) <= 1e-6
        (found - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("some", [False, True])
def test_checkpointing_computes_the_same_again(model: torch.nn.Module, some: bool) -> None:
    """With parameters that no step has closed."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            raw_update(parameter)
    _, expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if some:
        first = model.get_base_model().model.layers[0]
        first.gradient_checkpointing = False
    model.enable_input_require_grads()
    _, found = loss_and_gradients(model)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_two_forwards_before_their_backwards(model: torch.nn.Module) -> None:
    ids = tokens().to(DEVICE)
    losses = [model(input_ids=ids, labels=ids).loss for _ in range(2)]
    model.zero_grad()
    sum(losses).backward()
    twice = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    _, once = loss_and_gradients(model)
    for name, gradient in once.items():
        assert torch.equal(twice[name], 2 * gradient), name


def test_another_adapter_another_dtype_another_copy(model: torch.nn.Module) -> None:
    model.add_adapter("other", model.peft_config["default"])
    randomise_adapter(model, seed=5)
    before = logits(model)
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="'other' was added to layers"):
        assert not torch.equal(logits(model), before)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), before)
    model.delete_adapter("other")
    assert torch.equal(logits(model), before)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert relative_error(logits(model).float(), before) <= 0.1
    assert torch.equal(logits(model), before)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run there")
def test_a_backend_that_cannot_run_is_named_itself() -> None:
    """Not the one that would make the closed factors for it."""
    code = """
import torch, grasp_kernels as gk
layer = gk.GraspLoRALinear.from_linear(torch.nn.Linear(16, 8), r=2, backend="cuda")
try:
    layer(torch.ones(3, 16))
except ValueError as error:
    print(error)
"""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept, check=True
    )
    assert done.stdout.startswith("backend 'cuda' cannot run on cpu: ")
