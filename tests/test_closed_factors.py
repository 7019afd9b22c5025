"""A°, B° of many adapters in one launch, and when the layers of a model make them anew."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import randomise_adapter, tiny_peft_model, tokens
from test_replacement import (
    a_subspace,
    assert_same_gradients,
    assert_same_logits,
    logits,
    loss_and_gradients,
)

import grasp_kernels as gk
from grasp_kernels.layers import factors
from grasp_kernels.layers.linear import GraspLoRALinear
from grasp_kernels.ops.closure.api import BACKENDS, Factor, close
from grasp_kernels.ops.lora_linear.triton import base_product
from grasp_kernels.testing import ROUNDING, orthonormal, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def some_factors(dtype: torch.dtype) -> list[Factor]:
    """A and Bᵀ of unequal adapters, with and without a basis, one of them a full one."""
    g = torch.Generator().manual_seed(0)
    found = []
    for R, C, P in ((4, 48, 3), (17, 300, 0), (16, 5000, 0), (3, 40, 32), (128, 600, 4), (2, 7, 7)):
        for by_rows in (True, False):
            shape = (R, C) if by_rows else (C, R)
            matrix = torch.randn(*shape, generator=g).to(DEVICE, dtype)
            basis = orthonormal(C, P, g).to(DEVICE) if P else None
            found.append(Factor(matrix if by_rows else matrix.mT, basis))
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", DTYPES)
@pytest.mark.parametrize("to", DTYPES)
def test_every_factor_is_closed_and_rounded_once(
    backend: str, of: torch.dtype, to: torch.dtype
) -> None:
    given = some_factors(of)
    for (matrix, basis, _), found in zip(given, close(given, to, backend=backend), strict=True):
        exact = matrix.double()
        if basis is not None:
            exact = exact - exact @ basis.double() @ basis.double().mT
        size = torch.linalg.vector_norm(matrix.double())
        error = torch.linalg.vector_norm(found.double() - exact) / size
        assert error <= ROUNDING * 2 * torch.finfo(to).eps + 1e-6
        assert found.dtype == to
        assert found.stride() == matrix.stride()
        if basis is not None and to == torch.float32:
            assert torch.linalg.vector_norm(found @ basis) <= 1e-6 * size


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_go_where_they_are_told(backend: str) -> None:
    given = some_factors(torch.float32)
    expected = close(given, torch.bfloat16, backend=backend)
    places = []
    for i, factor in enumerate(given):
        R, C = factor.matrix.shape
        place = torch.zeros(R + 2, C + 3, dtype=torch.bfloat16, device=DEVICE)[1 : R + 1, 2 : C + 2]
        places.append(place if i % 3 else None)  # into new memory now and then
    told = [f._replace(out=place) for f, place in zip(given, places, strict=True)]
    for place, found, exact in zip(
        places, close(told, torch.bfloat16, backend=backend), expected, strict=True
    ):
        assert torch.equal(found, exact)
        if place is not None:
            assert found is place
            assert place._base.count_nonzero() == exact.count_nonzero()


def test_mixed_dtypes_and_nothing() -> None:
    given = [*some_factors(torch.float32)[:3], *some_factors(torch.bfloat16)[3:6]]
    closed = close(given, torch.float32, backend="triton")
    for found, expected in zip(
        closed, close(given, torch.float32, backend="reference"), strict=True
    ):
        assert relative_error(found, expected) <= 1e-6
    assert close([], torch.float32, backend="triton") == []


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many factors each launch closed."""
    counted: list[int] = []
    original = factors.close

    def counting(given: Any, *args: Any, **options: Any) -> Any:
        counted.append(len(given))
        return original(given, *args, **options)

    monkeypatch.setattr(factors, "close", counting)
    yield counted


@pytest.fixture
def model(launches: list[int]) -> torch.nn.Module:
    """A tiny model on the kernels after its first pass, in which every layer has joined."""
    found = tiny_peft_model(targets=("q_proj", "o_proj", "down_proj")).to(DEVICE)
    gk.replace_lora_layers(found, a_subspace(found), backend="triton")
    logits(found)
    assert launches == [2] * 9
    launches.clear()
    return found.train()


def test_one_launch_a_forward_pass(model: torch.nn.Module, launches: list[int]) -> None:
    for _ in range(3):
        loss_and_gradients(model)
    assert launches == [18] * 3


def same_as_aten(model: torch.nn.Module) -> None:
    other = tiny_peft_model(targets=("q_proj", "o_proj", "down_proj")).to(DEVICE)
    gk.replace_lora_layers(other, a_subspace(other), backend="aten")
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


@pytest.mark.parametrize("some", [False, True])
def test_an_update_is_seen_after_checkpointing(
    model: torch.nn.Module, launches: list[int], some: bool
) -> None:
    """Layers that are computed again in the backward take the factors of the forward."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if some:
        first = model.get_base_model().model.layers[0]
        first.gradient_checkpointing = False
    model.enable_input_require_grads()
    for _ in range(2):
        loss_and_gradients(model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                raw_update(parameter)
    assert launches == [18] * 2
    same_as_aten(model)


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
    assert not torch.equal(logits(model), before)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    other = copy.deepcopy(model)
    shared = {id(m.factors) for m in other.modules() if isinstance(m, GraspLoRALinear)}
    ours = {id(m.factors) for m in model.modules() if isinstance(m, GraspLoRALinear)}
    assert len(shared) == len(ours) == 1
    assert shared != ours
    assert torch.equal(logits(other), before)
    model.delete_adapter("other")
    assert torch.equal(logits(model), before)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert relative_error(logits(model).float(), before) <= 0.1
    assert torch.equal(logits(model), before)


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.nn.Module]:
    """A tiny model whose weights are padded, with every product that can be in its padding."""
    taken: list[str] = []

    def choose(*shape: Any, padded: bool) -> str:
        taken.append("padded" if padded else "extended")
        return taken[-1]

    monkeypatch.setattr(base_product, "choose", choose)
    found = tiny_peft_model(targets=("q_proj", "o_proj", "down_proj")).to(DEVICE)
    gk.replace_lora_layers(found, a_subspace(found), backend="triton", pad_weights=True)
    yield found.train()
    assert set(taken) == {"padded"}


def closed_stock() -> torch.nn.Module:
    """peft's own layers with the factors that `padded` computes with."""
    found = tiny_peft_model(targets=("q_proj", "o_proj", "down_proj")).to(DEVICE)
    gk.replace_lora_layers(found, a_subspace(found), backend="aten")
    gk.restore_lora_layers(found)
    return found


def test_padded_weights_carry_the_adapter(padded: torch.nn.Module) -> None:
    for update in (None, raw_update, counted_update):
        for name, parameter in padded.named_parameters():
            if "lora_" in name and update is not None:
                update(parameter)
        same_as_aten(padded)


def test_padded_weights_are_the_weights(padded: torch.nn.Module) -> None:
    original = dict(tiny_peft_model(targets=("q_proj", "o_proj", "down_proj")).named_parameters())
    before = logits(padded)
    layers = [m for m in padded.modules() if isinstance(m, GraspLoRALinear)]
    for layer in layers:
        assert layer.base_layer.weight.data_ptr() == layer.padded_weight.data_ptr()
    for name, parameter in padded.named_parameters():
        assert torch.equal(parameter.cpu(), original[name]) or "lora_" in name
    padded.merge_adapter()
    assert_same_logits(logits(padded), before, closed_stock())
    padded.unmerge_adapter()
    assert_same_logits(logits(padded), before, closed_stock())
    gk.restore_lora_layers(padded)
    for layer in layers:
        assert layer.base_layer.weight.is_contiguous()
        assert not hasattr(layer, "padded_weight")
    assert_same_logits(logits(padded), before, closed_stock())


def test_a_stale_graph_over_padded_weights_says_so(padded: torch.nn.Module) -> None:
    """The factors that its forward saved lie in the padding and are overwritten by the next one."""
    ids = tokens().to(DEVICE)
    loss = padded(input_ids=ids, labels=ids).loss
    for name, parameter in padded.named_parameters():
        if "lora_" in name:
            counted_update(parameter)
    padded(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_padding_of_another_place_is_left_alone(padded: torch.nn.Module) -> None:
    before = logits(padded)
    gk.restore_lora_layers(padded)
    gk.replace_lora_layers(padded, a_subspace(padded), backend="triton", pad_weights=True)
    assert_same_logits(logits(padded), before, closed_stock())
    layer = next(m for m in padded.modules() if isinstance(m, GraspLoRALinear))
    layer.base_layer.weight.data = layer.base_layer.weight.data.clone()
    assert layer.padded_parts("default", torch.float32) is None
    assert layer.padded_weight is None


def test_without_kernels_the_operator_closes_by_itself(launches: list[int]) -> None:
    found = tiny_peft_model(targets=("q_proj",))
    gk.replace_lora_layers(found)
    logits(found)
    assert launches == []


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
