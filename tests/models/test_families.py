"""Every model family on a tiny random model: projection, closure, stock peft, identification.

`D` width of the stream, `k` directions. The reference knows nothing of writers: it projects the
gradient of the stream where a norm or a block takes it.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

import grasp_kernels as gk
from grasp_kernels.layers.closed import GraspLoRAExperts
from grasp_kernels.models.architectures import RULES, model_gains, model_sites
from grasp_kernels.models.names import base_name
from grasp_kernels.ops import backends
from grasp_kernels.ops.lora_linear.registry import computes
from tests.helpers.comparisons import assert_same_logits, logits, loss_and_gradients
from tests.helpers.families import FAMILIES, D, adapted, families, tiny
from tests.helpers.models import a_subspace, tokens
from tests.helpers.oracle import budget, relative_error

BEFORE_NORM = ("gemma2", "gemma3_text", "olmo2", "olmo3")


def blocks_of(model: Any, family: str) -> Any:
    name = RULES[family].blocks
    return next(m for n, m in model.named_modules() if n.endswith(f".{name}"))


@contextmanager
def projected_stream(model: Any, family: str, V: Tensor) -> Iterator[None]:
    """The gradient of the stream is projected after every addition to it."""

    def project(stream: Tensor) -> None:
        if stream.requires_grad:
            stream.register_hook(lambda gradient: gradient - gradient @ V @ V.mT)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        project(output[0] if isinstance(output, tuple) else output)

    def before(_: nn.Module, inputs: Any, __: Any = None) -> None:
        project(inputs[0])

    handles = []
    for block in blocks_of(model, family):
        handles.append(block.register_forward_hook(after))
        between = FAMILIES[family].between
        if between is not None:
            handles.append(block.get_submodule(between).register_forward_pre_hook(before))
    yield
    for handle in handles:
        handle.remove()


@families
def test_gradients_are_those_of_a_projected_stream(family: str) -> None:
    model = adapted(family)
    subspace = a_subspace(model)
    plain = loss_and_gradients(model)[1]
    with projected_stream(model, family, subspace.basis):
        expected = loss_and_gradients(model)[1]
    report = gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, orthogonal=False))
    found = loss_and_gradients(model)[1]
    assert found.keys() == expected.keys() == plain.keys()
    for name, gradient in expected.items():
        error = torch.linalg.vector_norm(found[name] - gradient)
        assert error <= 1e-4 * torch.linalg.vector_norm(gradient), name
    assert any(
        torch.linalg.vector_norm(plain[n] - g) > 1e-2 * torch.linalg.vector_norm(g)
        for n, g in expected.items()
    )
    assert all("parameter" in why for why in report.fallbacks.values())


@pytest.mark.slow
@families
def test_no_leakage_after_training_and_stock_peft_loads_it(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    subspace = a_subspace(model)
    report = gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    ids = tokens()
    losses = []
    for _ in range(10):
        losses.append(model(input_ids=ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    leaks = gk.leakage(model)
    assert max(leaks.values()) <= 1e-6 and not leaks.unseen
    assert leaks.keys() >= set(report.projected)
    experts = sum(isinstance(m, ParamWrapper) for m in model.modules())

    expected = logits(model)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny(family), tmp_path)
    assert_same_logits(logits(stock), expected, stock)
    gk.remove_grasp(model)
    assert not any(isinstance(m, (gk.GraspLoRALinear, GraspLoRAExperts)) for m in model.modules())
    assert_same_logits(logits(model), expected, model)
    if not experts:  # what an adapter folder holds is measured in the same way
        assert max(gk.leakage(tmp_path, subspace).values()) <= 1e-6
    merged = gk.leakage(model.merge_and_unload(), subspace, base=tiny(family))
    assert merged.keys() >= leaks.keys()
    assert max(merged.values()) <= 1e-5  # merging rounds


@families
def test_without_a_subspace_it_is_stock_peft(family: str) -> None:
    model = adapted(family)
    expected, stock = logits(model), loss_and_gradients(model)[1]
    gk.apply_grasp(model)
    assert_same_logits(logits(model), expected, model)
    found = loss_and_gradients(model)[1]
    for name, gradient in stock.items():
        error = torch.linalg.vector_norm(found[name] - gradient)
        assert error <= 1e-4 * torch.linalg.vector_norm(gradient), name


def plant(model: Any, direction: Tensor) -> None:
    """Move every adapter that writes along one direction of the stream, beside noise."""
    sites = {site.name: site for site in model_sites(model)}
    gains = model_gains(model, sites.values())
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, module in modules.items():
            site = sites.get(base_name(name))
            if site is None or not hasattr(module, "lora_A"):
                continue
            # Which direction of the layer is that of the stream: the pseudo-inverse of the norm.
            local = direction / gains[site.norm] if site.norm in gains else direction
            B = module.lora_B["default"].weight
            B *= 0.3
            B[:, 0] = 3 * local / local.norm() * B.norm()


@families
def test_a_planted_direction_is_identified(family: str) -> None:
    model = adapted(family, experts=False)
    direction = torch.randn(D)
    direction = direction - direction.mean()  # a LayerNorm would take the mean out
    direction /= direction.norm()
    plant(model, direction)
    subspace = gk.identify(model, k=1)
    assert (subspace.basis[:, 0] @ direction).abs().item() > 0.95
    wanted = model_gains(model, model_sites(model))
    assert all(torch.equal(gain, wanted[norm]) for norm, gain in subspace.gains.items())
    assert subspace.gains.keys() == wanted.keys()
    assert not gk.apply_grasp(model, gk.GraspConfig(subspace=subspace)).fallbacks


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_folders_are_identified_like_models(family: str, tmp_path: Path) -> None:
    """The gains come from the checkpoint, whatever its norms are called."""
    model = adapted(family)
    model.save_pretrained(tmp_path / "adapter")
    tiny(family).save_pretrained(tmp_path / "base")
    one = gk.identify(model, k=1)
    other = gk.identify(tmp_path / "adapter", k=1, base_model=tmp_path / "base")
    assert torch.equal(other.basis, one.basis)
    assert one.gains.keys() == other.gains.keys()
    for norm, gain in one.gains.items():
        assert torch.equal(other.gains[norm], gain), norm


@pytest.mark.slow
@families
def test_merged_models_come_back_as_adapters(family: str, tmp_path: Path) -> None:
    """Of models and of folders; stock peft computes what was merged."""
    model = adapted(family, experts=False)
    expected, base = logits(model), tiny(family)
    wanted = {base_name(n) for n, module in model.named_modules() if hasattr(module, "lora_A")}
    merged = model.merge_and_unload()
    rounded = relative_error(logits(merged), expected)
    for name, one in (("merged", merged), ("base", base)):
        one.save_pretrained(tmp_path / name)
    pairs = itertools.product((merged, tmp_path / "merged"), (base, tmp_path / "base"))
    for i, given in enumerate(pairs):
        found = gk.extract_adapter(*given, tmp_path / f"{i}", rank=3)
        assert found.shares.keys() == wanted and found.outside == []
        stock = PeftModel.from_pretrained(tiny(family), str(tmp_path / f"{i}"))
        # The decomposition, its roots and their product round too: at most 6 times as much.
        assert relative_error(logits(stock), expected) <= 12 * rounded


def test_what_peft_would_misread_is_left_out_of_an_extracted_adapter(tmp_path: Path) -> None:
    """The dense block of Qwen3-MoE, whose modules are called like parts of the experts."""
    base, changed = tiny("qwen3_moe"), tiny("qwen3_moe")
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight += 0.1
        changed.model.layers[1].self_attn.o_proj.weight += 0.1
        changed.model.layers[1].mlp.experts.down_proj += 0.1
    found = gk.extract_adapter(changed, base, tmp_path / "adapter", rank=1)
    assert list(found.shares) == ["model.layers.1.self_attn.o_proj"]
    assert set(found.outside) == {
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    PeftModel.from_pretrained(tiny("qwen3_moe"), str(tmp_path / "adapter"))


def test_autocast_leaves_the_adapters_of_experts_as_they_are() -> None:
    """Each forward closes them, in float32 whatever autocast computes in."""
    model = adapted("mixtral")
    gk.apply_grasp(model, gk.GraspConfig(subspace=a_subspace(model)))
    logits(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("backend", [name for name, why in backends().items() if why is None])
def test_transposed_weights_on_every_backend(backend: str) -> None:
    model = adapted("gpt2").to(torch.float32 if computes(backend, torch.float32) else torch.half)
    subspace = a_subspace(model)
    layer = blocks_of(model, "gpt2")[0].mlp.c_proj
    x = torch.randn(24, 4 * D, dtype=model.dtype)
    dy = torch.randn(24, D, dtype=model.dtype)

    def results(backend: str) -> list[Tensor]:
        """`Y`, `dX`, `dA`, `dB`."""
        gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, backend=backend))
        assert layer.why_stock(x.to(model.dtype)) is None
        inputs = [x.to(model.dtype).requires_grad_(), *layer.lora_A.parameters()]
        inputs += layer.lora_B.parameters()
        y = layer(inputs[0])
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(model.dtype))]

    found = [results(name) for name in (backend, "reference")]
    model.double()
    oracle = results("reference")
    worst = [
        max(((f.double() - o).norm() / o.norm()).item() for f, o in zip(one, oracle, strict=True))
        for one in found
    ]
    assert worst[0] <= 1.5 * worst[1]


def test_merged_transposed_weights_are_measured_in_folders_too(tmp_path: Path) -> None:
    model = adapted("gpt2")
    subspace = a_subspace(model)
    expected = gk.leakage(model, subspace)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny("gpt2").save_pretrained(tmp_path / "base")
    found = gk.leakage(tmp_path / "merged", subspace, base=tmp_path / "base")
    assert found.keys() == expected.keys()
    for name, leak in found.items():
        assert leak == pytest.approx(expected[name], rel=1e-4)


def test_experts_leak_unless_they_are_closed() -> None:
    model = adapted("mixtral")
    subspace = a_subspace(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace, orthogonal=False))
    name = "model.layers.0.mlp.experts.down_proj"
    wrapper = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    assert wrapper.parameter_name == "down_proj"
    delta = wrapper.get_delta_weight("default")
    along = subspace.basis.mT @ delta
    assert gk.leakage(model)[name] == pytest.approx((along.norm() / delta.norm()).item())
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    assert gk.leakage(model)[name] <= 1e-6
    along = subspace.basis.mT @ wrapper.get_delta_weight("default")
    assert along.norm() <= 1e-6 * delta.norm()


@pytest.mark.parametrize("family", BEFORE_NORM)
def test_a_closed_writer_before_a_norm_moves_nothing_along_the_subspace(family: str) -> None:
    """`Vᵀ norm(y + Δ) · rms(y + Δ) = Vᵀ norm(y) · rms(y)`: nothing but the common scale changes."""
    model = adapted(family)
    subspace = a_subspace(model)
    gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))
    block = blocks_of(model, family)[1]
    layer, norm = block.mlp.down_proj, block.post_feedforward_layernorm
    x = torch.randn(5, layer.in_features)

    def scaled(y: Tensor) -> Tensor:
        scale = y.double().square().mean(-1, keepdim=True).add(1e-6).sqrt()
        return norm(y).double() * scale

    with torch.no_grad():
        base, moved = layer.base_layer(x), layer(x)
        assert (norm(base) - norm(moved)).norm() > 0.1 * norm(base).norm()
        left = (scaled(moved) - scaled(base)) @ subspace.basis.double()
        # What rounding leaves of two vectors along any direction.
        assert left.norm() <= 2 * budget(0.0, torch.float32, D) * scaled(moved).norm()
