"""Planted directions are recovered, and the spectrum behind them is right."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grasp_kernels.subspace.identification as identification
from grasp_kernels.adapters import Adapter, LoRAWeights, load_adapter
from grasp_kernels.models.architectures import RULES
from grasp_kernels.subspace import Subspace, identify
from grasp_kernels.subspace.identification import choose_k, stack_blocks
from tests.helpers.models import tiny_peft_model
from tests.helpers.oracle import budget, relative_error
from tests.helpers.synthetic import synthetic_adapter, unit_directions

WIDTH = 128
# Of a spectrum of at most 16 values: leading_triples draws that many, and leaves out nothing.
LIMIT = budget(0.0, torch.float32, WIDTH)


@pytest.fixture(autouse=True)
def synthetic_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let identify take adapters that are already loaded."""

    def load_or_pass(source: Any, **options: Any) -> Adapter:
        return source if isinstance(source, Adapter) else load_adapter(source, **options)

    monkeypatch.setattr(identification, "load_adapter", load_or_pass)


def cosine(basis: Tensor, planted: Tensor) -> float:
    """Smallest principal cosine: how well all of the planted directions are covered."""
    return float(torch.linalg.svdvals(basis.mT @ planted).min())


def changed(adapter: Adapter, **layers: LoRAWeights) -> Adapter:
    """An adapter with other layers at some places."""
    chosen = list(adapter.layers)
    for place, layer in layers.items():
        chosen[int(place.removeprefix("at"))] = layer
    return dataclasses.replace(adapter, layers=tuple(chosen))


# recovery


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_planted_direction_is_found(seed: int, family: str) -> None:
    planted, rule = unit_directions(WIDTH, seed=seed), RULES[family]
    adapter = synthetic_adapter(planted=planted, strength=4, rule=rule, seed=seed)
    subspace = identify(adapter)
    assert subspace.k == 1 and cosine(subspace.basis, planted) > 0.95
    assert len(subspace.gains) == (16 if family == "olmo2" else 0)
    for layer in adapter.layers:
        assert layer.site is not None
        gain = layer.gain if layer.gain is not None else torch.ones(WIDTH)
        expected = planted * gain[:, None]
        assert cosine(subspace.at(layer.site), expected / expected.norm()) > 0.95


def test_two_planted_directions_are_both_found() -> None:
    planted = unit_directions(WIDTH, 2)
    subspace = identify(synthetic_adapter(planted=planted, strength=4))
    assert subspace.k == 2 and cosine(subspace.basis, planted) > 0.95


def test_the_loudest_layer_does_not_decide() -> None:
    planted, shout = unit_directions(WIDTH, seed=1), unit_directions(WIDTH, seed=2)
    adapter = synthetic_adapter(planted=planted, strength=4)
    first = adapter.layers[0]
    loud = first.lora_B + 100 * torch.outer(shout[:, 0], torch.ones(first.lora_B.shape[1]))
    subspace = identify(changed(adapter, at0=dataclasses.replace(first, lora_B=loud)))
    assert subspace.k == 1 and cosine(subspace.basis, planted) > 0.95


def test_checkpoints_are_stacked() -> None:
    planted = unit_directions(WIDTH)
    sources = [synthetic_adapter(planted=planted, strength=2, seed=s) for s in range(3)]
    together, alone = identify(sources), identify(sources[0])
    assert cosine(together.basis, planted) > cosine(alone.basis, planted)
    assert together.metadata["adapters"] == ["seed 0", "seed 1", "seed 2"]
    assert together.metadata["n_blocks"] == 3 * alone.metadata["n_blocks"] == 48


def test_rank_deficient_and_zero_blocks() -> None:
    planted = unit_directions(WIDTH)
    adapter = synthetic_adapter(planted=planted, strength=4)
    a, b = adapter.layers[:2]
    zero = dataclasses.replace(a, lora_B=torch.zeros_like(a.lora_B))
    twice = dataclasses.replace(b, lora_A=torch.cat([b.lora_A[:4]] * 2))
    subspace = identify(changed(adapter, at0=zero, at1=twice))
    assert cosine(subspace.basis, planted) > 0.95
    assert any("1 blocks are zero" in note and a.name in note for note in subspace.notes)


# k and what is refused


@pytest.mark.parametrize(
    ("values", "k"),
    [
        ([5.0, 1.0, 0.9], 3),  # what follows the last value is rounding
        ([5.0, 1.0, 0.9, 0.8, 0.7], 1),
        ([5.0, 4.0, 1.0, 0.9, 0.8], 2),
        ([5.0, 2.0, 1.9, 1.8, 0.1], 4),
        ([5.0, 4.9, 4.8, 4.7, 4.65, 0.1], 3),
        ([3.0], 1),
    ],
)
def test_k_is_where_the_largest_gap_is(values: list[float], k: int) -> None:
    assert choose_k(values) == k


def test_explicit_k_is_obeyed_up_to_the_rank() -> None:
    assert identify(synthetic_adapter(), k=20).k == 20
    adapter = synthetic_adapter(rank=2, layers=3)
    assert identify(adapter, k=12).k == 12
    with pytest.raises(ValueError, match=r"k is 13, but .* 12 directions.*choose fewer"):
        identify(adapter, k=13)


@pytest.mark.parametrize("k", [0, -1, "many", True, 1.5])
def test_unfit_k(k: Any) -> None:
    with pytest.raises(ValueError, match=f"k is {k!r}; it must be"):
        identify(synthetic_adapter(), k=k)


def test_no_adapter_at_all() -> None:
    with pytest.raises(ValueError, match="got no adapter"):
        identify([])


def test_widths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"with width 64, but '.*' with 128"):
        identify([synthetic_adapter(width=128), synthetic_adapter(width=64)])


def test_an_adapter_without_writers_says_so() -> None:
    with pytest.raises(ValueError, match=r"no LoRA weights that write .*train with those"):
        identify(tiny_peft_model(("q_proj", "v_proj")))


# what is measured


def test_blocks_hold_the_spectra_of_the_deltas_at_norm_one() -> None:
    adapter = synthetic_adapter(width=64, layers=2)
    stack = stack_blocks(adapter.layers)
    assert stack.zero == [] and stack.n_blocks == 4
    for layer, rows in zip(adapter.layers, stack.rows.split(8), strict=True):
        exact = torch.linalg.svdvals(layer.lora_B.double() @ layer.lora_A.double())[:8]
        values = torch.linalg.svdvals(rows.double())
        assert relative_error(values, exact / exact[0]) <= budget(0.0, rows.dtype, 64)


def test_the_spectrum_is_that_of_the_stacked_deltas() -> None:
    """Left singular vectors and values of the full matrices, each at spectral norm 1."""
    adapter = synthetic_adapter(layers=3, planted=unit_directions(WIDTH), rank=2)
    blocks = []
    for w in adapter.layers:
        delta = w.scaling * w.lora_B.double() @ w.lora_A.double()
        blocks.append(delta / torch.linalg.matrix_norm(delta, 2))
    u, s, _ = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    subspace = identify(adapter, k=2)
    measured = torch.tensor(subspace.metadata["singular_values"][:2], dtype=torch.float64)
    assert relative_error(measured, s[:2]) <= LIMIT
    assert 1 - cosine(subspace.basis.double(), u[:, :2]) <= LIMIT
    assert f"of 6 stacked blocks of norm 1 are {s[0]:.2f}, {s[1]:.2f}" in subspace.notes[0]
    assert "2.45 would mean that all blocks share one direction" in subspace.notes[0]


@pytest.mark.parametrize("known", [True, False])
def test_writers_before_norms_are_stacked_with_their_gain(known: bool) -> None:
    adapter = synthetic_adapter(layers=2, rank=4, rule=RULES["olmo2"])
    gains = [w.gain if known else None for w in adapter.layers]
    layers = tuple(
        dataclasses.replace(w, gain=g) for w, g in zip(adapter.layers, gains, strict=True)
    )
    blocks = []
    for w in layers:
        gain = torch.ones(WIDTH) if w.gain is None else w.gain
        delta = gain[:, None] * (w.lora_B.double() @ w.lora_A.double())
        blocks.append(delta / torch.linalg.matrix_norm(delta, 2))
    s = torch.linalg.svdvals(torch.cat(blocks, dim=1))
    subspace = identify(dataclasses.replace(adapter, layers=layers), k=1)
    largest = torch.tensor(subspace.metadata["singular_values"][0], dtype=torch.float64)
    assert relative_error(largest, s[0]) <= LIMIT
    unknown = any("gains of the norms are unknown" in note for note in subspace.notes)
    assert unknown == (not known) and bool(subspace.gains) == known


def test_the_same_adapter_gives_the_same_basis() -> None:
    adapter = synthetic_adapter(planted=unit_directions(WIDTH))
    first, again = identify(adapter), identify(adapter)
    assert torch.equal(first.basis, again.basis) and first.metadata == again.metadata


def test_a_saved_peft_model_end_to_end(tmp_path: Path) -> None:
    model = tiny_peft_model()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    from_model = identify(model, k=2)
    from_folder = identify(tmp_path / "adapter", k=2, base_model=model)
    assert torch.equal(from_model.basis, from_folder.basis)
    from_model.save(tmp_path / "s.safetensors")
    loaded = Subspace.load(tmp_path / "s.safetensors")
    assert (loaded.notes, loaded.metadata) == (from_model.notes, from_model.metadata)
