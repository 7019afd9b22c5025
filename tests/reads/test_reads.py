"""Contrastive reads: the rows, the moments they come from, and an adapter that keeps them."""

import copy
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import grasp_kernels as gk
from grasp_kernels import RunConfig, run
from grasp_kernels.data import Example
from grasp_kernels.models.frozen_model import frozen_base
from grasp_kernels.models.names import adapted_layers
from grasp_kernels.reads.contrast import RIDGE, contrasting_rows
from grasp_kernels.reads.moments import input_groups, second_moments
from tests.helpers.comparisons import assert_same_logits, logits
from tests.helpers.models import SIZES, randomise_adapter, tiny_model, tokens
from tests.helpers.oracle import budget, relative_error

pytest_plugins = ("tests.helpers.runs",)
ROOMY = 1 << 30  # bytes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moment(K: int, tokens: int, seed: int) -> Tensor:
    """`E x xᵀ [K, K]` of random text whose directions differ in strength."""
    x = torch.randn(tokens, K, generator=generator(seed)) * torch.linspace(0.1, 3, K)
    x = x @ torch.linalg.qr(torch.randn(K, K, generator=generator(seed + 1))).Q
    return x.mT @ x / tokens


def fresh_adapter(r: int = 4, config_class: type = LlamaConfig, **options: Any) -> PeftModel:
    model = tiny_model(config_class)
    lora = LoraConfig(r=r, lora_alpha=8, **{"target_modules": "all-linear", **options})
    return get_peft_model(model, lora)


def examples(count: int = 24, lengths: tuple[int, int] = (4, 9)) -> list[Example]:
    """Texts of words 5 to 19, of several lengths."""
    drawn = torch.randint(*lengths, (count,), generator=generator(3)).tolist()
    rows = [torch.randint(5, 20, (n,), generator=generator(n)).tolist() for n in drawn]
    return [Example(input_ids=row, labels=list(row)) for row in rows]


def documents(count: int = 30) -> list[list[int]]:
    """Texts of any words."""
    return torch.randint(1, 64, (count, 8), generator=generator(4)).tolist()


def made(model: PeftModel, **options: Any) -> gk.ContrastiveReads:
    return gk.ContrastiveReads.make(model, examples(), documents(), **options)


# Rows


@settings(max_examples=30, deadline=None)
@given(K=st.integers(2, 40), R=st.integers(1, 12), seed=st.integers(0, 2**20))
def test_rows_are_the_leading_generalised_eigenvectors(K: int, R: int, seed: int) -> None:
    """Against the whole symmetric problem in float64; energies of both texts are diagonal."""
    training, own = moment(K, 3 * K, seed), moment(K, 3 * K, seed + 7)
    rows, ratios = contrasting_rows(training, own, R, generator=generator())
    assert rows.shape == (R, K) and ratios.shape == (R,)
    n = min(R, K)
    assert not rows[n:].any() and not ratios[n:].any()
    training, own = training.double(), own.double()
    level = RIDGE * (training.trace() + own.trace()) / (2 * K)
    own = own + level * torch.eye(K)
    root = torch.linalg.inv(torch.linalg.cholesky(own))
    expected = torch.linalg.eigvalsh(root @ training @ root.mT).flip(0)[:n]
    a = rows[:n].double()
    seen, other = a @ training @ a.mT, a @ own @ a.mT
    # Randomised iteration finds close values to a part of the largest one.
    loose = 1e-3 * expected[0]
    assert torch.allclose(ratios[:n].double(), expected, rtol=0, atol=loose)
    assert torch.allclose(seen.diagonal() / other.diagonal(), expected, rtol=0, atol=loose)
    assert (ratios[:-1] >= ratios[1:]).all()
    wanted = training.trace() / (3 * K)
    largest = torch.maximum(seen.diagonal(), other.diagonal())
    assert torch.allclose(largest, wanted.expand(n), rtol=2e-3)
    scale = other.diagonal().sqrt()
    correlation = other / scale / scale[:, None] - torch.eye(n)
    assert correlation.abs().max() < 1e-3


def test_rows_point_at_what_only_training_text_has() -> None:
    own, training = torch.eye(16), torch.eye(16)
    training[3, 3] = 50.0
    own[5, 5] = 0.01  # rarer in own text than elsewhere: the second best
    rows, ratios = contrasting_rows(training, own, 2, generator=generator())
    directions = rows / rows.norm(dim=1, keepdim=True)
    assert directions[1, 5].abs() > 0.999 or directions[0, 5].abs() > 0.999
    assert directions[:, 3].abs().max() > 0.999
    assert ratios[0] > ratios[1] > 40


@pytest.mark.parametrize("silent", ["training", "own", "both"])
def test_text_that_never_comes_somewhere(silent: str) -> None:
    some, none = moment(8, 30, 0), torch.zeros(8, 8)
    training, own = (none if silent in (name, "both") else some for name in ("training", "own"))
    rows, ratios = contrasting_rows(training, own, 3, generator=generator())
    assert torch.isfinite(rows).all() and torch.isfinite(ratios).all()
    assert bool(rows.any()) == (silent == "own")


# Moments


def inputs_of(base: Any, layer: Any, sequences: list[list[int]]) -> Tensor:
    """What a layer is given, one sequence after another and so without padding, `[tokens, K]`."""
    rows: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: rows.append(given[0][0].detach()))
    for row in sequences:
        base(input_ids=torch.tensor([row]))
    handle.remove()
    return torch.cat(rows).double()


def test_little_text_of_inputs_with_a_few_large_coordinates_gives_rows() -> None:
    """As of a real model: the sums of own text are off by more than the ridge."""
    draw = generator()

    def moment(tokens: int) -> torch.Tensor:
        x = torch.randn(tokens, 1536, generator=draw)
        x[:, 3:9] += 1000
        return x.mT @ x / tokens

    training, own = moment(240), moment(60)
    ridged = own.double()
    ridged.diagonal().add_(RIDGE * (training.double() + own).trace() / (2 * 1536))
    assert torch.linalg.cholesky_ex(ridged).info > 0
    rows, ratios = contrasting_rows(training, own, 2, generator=draw)
    assert rows.isfinite().all() and rows.any(dim=1).all() and (ratios > 0).all()
    with pytest.raises(ValueError, match="not finite"):
        contrasting_rows(training, own.fill_(float("nan")), 2, generator=draw)


def test_moments_are_those_of_the_tokens_without_padding() -> None:
    model = fresh_adapter()
    layers = dict(adapted_layers(model, "default"))
    widths = {name: layer.in_features for name, layer in layers.items()}
    text = [example["input_ids"] for example in examples()]
    with frozen_base(model) as base:
        found = second_moments(base, layers, widths, text, 5)
        assert found.keys() == layers.keys()
        ids = torch.tensor([text[0]])
        stream = base.base_model(input_ids=ids).last_hidden_state
        exact = copy.deepcopy(base).double().base_model(input_ids=ids).last_hidden_state
        depth = relative_error(stream, exact)
        for name in list(layers)[:7]:
            x = inputs_of(base, layers[name], text)
            expected = x.mT @ x / len(x)
            # Summed in float32, of inputs that came through the model with other batches.
            error = relative_error(found[name], expected)
            assert error <= 2 * budget(depth, torch.float32, len(x)), name


def test_layers_with_one_input_share_it_and_groups_fit_the_memory() -> None:
    model = fresh_adapter()
    layers = dict(adapted_layers(model, "default"))
    widths = {name: layer.in_features for name, layer in layers.items()}
    with frozen_base(model) as base:
        (together,) = input_groups(base, layers, widths, [1, 2, 3], ROOMY)
        alone = input_groups(base, layers, widths, [1, 2, 3], 1)
        pairs = input_groups(base, layers, widths, [1, 2, 3], 2 * 4 * 32**2)
    parts = sorted(sorted(n.split(".")[-1] for n in names) for names in together.values())
    one_layer = [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
    ]
    assert parts == sorted(one_layer * SIZES["num_hidden_layers"])
    assert [len(group) for group in alone] == [1] * len(together)
    assert {leader: names for group in pairs for leader, names in group.items()} == together
    assert max(sum(4 * widths[leader] ** 2 for leader in group) for group in pairs) <= 4 * 48**2


def test_few_tokens_show_who_shares() -> None:
    """The inputs of all layers are held while they are compared."""
    model = fresh_adapter()
    layers = dict(adapted_layers(model, "default"))
    widths = {name: layer.in_features for name, layer in layers.items()}
    lengths: set[int] = set()
    with ExitStack() as stack, frozen_base(model) as base:
        for layer in layers.values():
            see = layer.register_forward_pre_hook(lambda _, inputs: lengths.add(inputs[0].shape[1]))
            stack.callback(see.remove)
        long = input_groups(base, layers, widths, [1, 2, 3] * 40, ROOMY)
        lengths_of_long = set(lengths)
        assert long == input_groups(base, layers, widths, [1, 2, 3], ROOMY)
    assert lengths_of_long == {64}


def test_less_memory_gives_the_same_rows() -> None:
    model = fresh_adapter()
    roomy, tight = made(model), made(model, memory=1)
    assert roomy.rows.keys() == tight.rows.keys()
    for name, rows in roomy.rows.items():
        assert torch.equal(rows, tight.rows[name])
        assert torch.equal(roomy.ratios[name], tight.ratios[name])


def test_a_head_has_an_input_too() -> None:
    model = fresh_adapter(target_modules=["lm_head", "q_proj"])
    reads = made(model)
    assert {name.split(".")[-1] for name in reads.rows} == {"lm_head", "q_proj"}
    assert all(rows.any() for rows in reads.rows.values())


def test_stacked_experts_stay_free() -> None:
    """peft has one A for all of them, and what reads it is not the input of the stack."""
    model = fresh_adapter(config_class=MixtralConfig)
    reads = made(model)
    assert {name.split(".")[-1] for name in reads.rows} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    reads.apply(model)
    stacks = [m for m in model.modules() if hasattr(m, "parameter_name") and m.lora_A]
    assert stacks and all(m.lora_A["default"].weight.requires_grad for m in stacks)


# Adapters


def test_making_changes_nothing_and_follows_from_the_seed() -> None:
    model = fresh_adapter()
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    reads, again = made(model), made(model)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert all(torch.equal(rows, again.rows[name]) for name, rows in reads.rows.items())


def train(model: PeftModel, steps: int = 3) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_trained_adapter_reads_as_it_was_told(replaced: bool, tmp_path: Path) -> None:
    """A is bitwise what it was, B has learned, and stock peft computes the same from the files."""
    model = fresh_adapter()
    reads = made(model)
    reads.apply(model)
    if replaced:
        gk.apply_grasp(model)
    train(model)
    for name, layer in adapted_layers(model, "default"):
        assert torch.equal(layer.lora_A["default"].weight, reads.rows[name])
        assert layer.lora_A["default"].weight.grad is None
        assert layer.lora_B["default"].weight.any()
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    model.eval()
    assert_same_logits(logits(model), logits(stock), stock)


def test_a_new_adapter_of_a_name_that_was_deleted_is_free() -> None:
    model = fresh_adapter()
    made(model).apply(model)
    gk.apply_grasp(model)
    config = LoraConfig(r=2, target_modules="all-linear")
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    layers = dict(adapted_layers(model, "default")).values()
    assert all(layer.lora_A["default"].weight.requires_grad for layer in layers)


def test_layers_of_ours_stay_frozen_when_adapters_are_switched() -> None:
    """Off and on again, for a reference model say; a second adapter stays free."""
    model = fresh_adapter()
    made(model).apply(model)
    gk.apply_grasp(model)
    model.add_adapter("free", LoraConfig(r=2, target_modules="all-linear"))
    with model.disable_adapter():
        pass
    layers = dict(adapted_layers(model, "default")).values()
    assert not any(layer.lora_A["default"].weight.requires_grad for layer in layers)
    assert all(layer.lora_B["default"].weight.requires_grad for layer in layers)
    model.set_adapter("free")
    assert all(layer.lora_A["free"].weight.requires_grad for layer in layers)
    model.set_adapter("default")
    assert not any(layer.lora_A["default"].weight.requires_grad for layer in layers)


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    model = fresh_adapter()
    reads = made(model)
    with pytest.raises(ValueError, match="differ in 18 layers, such as"):
        reads.apply(fresh_adapter(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"are \(4, 32\) and A is \(2, 32\)|are \(4, 48\)"):
        reads.apply(fresh_adapter(r=2))
    randomise_adapter(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="is not zero, so a new A would change"):
        reads.apply(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for texts, own, adapter in (
        ([], documents(), "default"),
        (examples(), documents()[:0], "default"),
        (examples(), documents(), "other"),
    ):
        with pytest.raises(ValueError, match="none may be missing"):
            gk.ContrastiveReads.make(model, texts, own, adapter=adapter)
    with pytest.raises(ValueError, match="give both for the same ones"):
        gk.ContrastiveReads({}, {})


def test_layers_that_no_text_reaches_stay_free() -> None:
    model = fresh_adapter(target_modules=["q_proj"])
    reads = made(model)
    first = next(iter(reads.rows))
    reads.rows[first] = torch.zeros_like(reads.rows[first])
    drawn = dict(adapted_layers(model, "default"))[first].lora_A["default"].weight.clone()
    reads.apply(model)
    layer = dict(adapted_layers(model, "default"))[first]
    assert torch.equal(layer.lora_A["default"].weight, drawn)
    assert layer.lora_A["default"].weight.requires_grad


def test_files(tmp_path: Path) -> None:
    reads = made(fresh_adapter())
    path = tmp_path / "reads.safetensors"
    reads.save(path)
    found = gk.ContrastiveReads.load(path)
    assert found.rows.keys() == reads.rows.keys()
    for name, rows in reads.rows.items():
        assert torch.equal(found.rows[name], rows)
        assert torch.equal(found.ratios[name], reads.ratios[name])
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is no safetensors file"):
        gk.ContrastiveReads.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        gk.ContrastiveReads.load(tmp_path / "missing.safetensors")


# Runs


def test_the_adapter_of_a_run_reads_as_its_file_says(finished: RunConfig) -> None:
    report = run(finished)
    reads = gk.ContrastiveReads.load(report.reads)
    assert report.retrained is not None
    base = AutoModelForCausalLM.from_pretrained(finished.model)
    model = PeftModel.from_pretrained(base, str(report.retrained))
    for name, layer in adapted_layers(model, "default"):
        assert torch.equal(layer.lora_A["default"].weight, reads.rows[name])
    assert report.numbers["reads"].keys() == reads.rows.keys()
    text = report.text.read_text(encoding="utf-8")
    assert "reads along" in text and "(`--reads free`)" in text


@pytest.mark.parametrize("kl_coef", [1.0, 0.0])
def test_a_run_that_reads_freely(run_config: RunConfig, kl_coef: float) -> None:
    report = run(replace(run_config, reads="free", kl_coef=kl_coef, max_steps=3))
    assert not report.reads.exists()
    assert report.own_text.exists() == (kl_coef > 0)
    assert "fixed directions" not in report.text.read_text(encoding="utf-8")


def test_a_run_with_reads_alone_makes_text_for_them(run_config: RunConfig) -> None:
    report = run(replace(run_config, kl_coef=0.0, max_steps=3))
    assert report.reads.exists() and report.own_text.exists()
    assert "held at the base model's" not in report.text.read_text(encoding="utf-8")
