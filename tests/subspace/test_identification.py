"""Planted directions are recovered, noise gives none, and the numbers behind it are right."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grasp_kernels.subspace.identification as identification
from grasp_kernels.adapters import Adapter, LoRAWeights
from grasp_kernels.models.architectures import RULES
from grasp_kernels.subspace import Subspace, identify
from tests.helpers.models import tiny_peft_model
from tests.helpers.synthetic import RULE, synthetic_adapter, unit_directions

WIDTH = 128


@pytest.fixture(autouse=True)
def synthetic_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let identify take adapters that are already loaded."""
    load = identification.load_adapter

    def load_or_pass(source: Any, **options: Any) -> Adapter:
        return source if isinstance(source, Adapter) else load(source, **options)

    monkeypatch.setattr(identification, "load_adapter", load_or_pass)


def cosine(basis: Tensor, planted: Tensor) -> float:
    """Smallest principal cosine: how well all of the planted directions are covered."""
    return float(torch.linalg.svdvals(basis.mT @ planted).min())


def has_reason(subspace: Subspace, *parts: str) -> bool:
    return any(all(part in reason for part in parts) for reason in subspace.reasons)


def failed(subspace: Subspace) -> list[str]:
    """The sentences that say of a test that it was not passed."""
    known = r"unrelated layers give|, below \d|^Only \d+ of|^Only layer"
    return [one for one in subspace.reasons if re.search(known, one)]


# recovery


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_planted_direction_is_found(seed: int, family: str) -> None:
    planted, rule = unit_directions(WIDTH, seed=seed), RULES[family]
    adapter = synthetic_adapter(planted=planted, strength=4, rule=rule, seed=seed)
    subspace = identify(adapter)
    assert (failed(subspace), subspace.k) == ([], 1), subspace.summary()
    assert has_reason(subspace, "singular values")
    assert has_reason(subspace, ", at least 1.6 (a threshold from small models)")
    assert has_reason(subspace, "of 8 layers move along it, at least half")
    for site in rule.sites("model.layers", range(8)):
        if site.role != "write":
            assert site.name not in subspace.bases
            continue
        basis = subspace.bases[site.name]
        gain = next((w.gain for w in adapter.layers if w.site == site), None)
        expected = planted if gain is None else planted * gain[:, None]
        assert cosine(basis, expected / expected.norm()) > 0.95
    assert has_reason(subspace, "harmless factor")
    assert has_reason(subspace, "disjoint data")


def test_two_planted_directions_are_both_found() -> None:
    planted = unit_directions(WIDTH, 2)
    subspace = identify(synthetic_adapter(planted=planted, strength=4))
    assert (failed(subspace), subspace.k) == ([], 2), subspace.summary()
    assert subspace.stream is not None and cosine(subspace.stream, planted) > 0.95


def test_noise_gives_no_direction() -> None:
    """The null is exceeded in 5 % of all cases; a clear finding needs more than that."""
    found = [identify(synthetic_adapter(seed=s)) for s in range(20)]
    assert sum(one.is_empty for one in found) >= 18
    assert all(failed(one) for one in found)
    empty = identify(synthetic_adapter(seed=0))
    assert empty.is_empty and empty.k == 0
    assert has_reason(empty, "no evidence of a common direction")
    assert not has_reason(empty, "harmless factor")


def test_moderate_strength_is_noticed() -> None:
    """Half of a typical noise direction: each block hides it, eight layers together do not."""
    planted = unit_directions(WIDTH)
    found = [identify(synthetic_adapter(planted=planted, strength=0.6, seed=s)) for s in range(8)]
    assert sum(not subspace.is_empty for subspace in found) >= 7
    assert all(cosine(s.stream, planted) > 0.7 for s in found if s.stream is not None)


def test_a_direction_of_few_layers_says_which() -> None:
    planted = unit_directions(WIDTH)
    adapter = synthetic_adapter(layers=12, planted=planted, strength=8, carriers=[3, 4, 5, 6])
    subspace = identify(adapter)
    assert subspace.stream is not None
    assert cosine(subspace.stream, planted) > 0.9
    (sentence,) = (reason for reason in subspace.reasons if "layers move along it" in reason)
    count, named = re.search(r"Only (\d+) of 12 layers .* \(layers: (.*)\)", sentence).groups()
    assert int(count) <= 5 and {"3", "4", "5", "6"} <= set(named.split(", "))


def test_a_single_layer_says_so() -> None:
    adapter = synthetic_adapter(planted=unit_directions(WIDTH), strength=4, adapted=[3])
    subspace = identify(adapter)
    assert not subspace.is_empty
    assert has_reason(subspace, "Only layer 3 carries weights")
    assert not has_reason(subspace, "layers move along it")


def test_a_single_writer_gives_no_direction() -> None:
    adapter = synthetic_adapter(planted=unit_directions(WIDTH), strength=4, adapted=[0])
    one = Adapter(adapter.layers[:1], "one", None, "llama", 8, RULE, ())
    assert identify(one).is_empty


def test_shared_outlier_coordinates_are_not_a_direction() -> None:
    """A coordinate that is large in every block stays large under the flips of the null."""
    adapter = synthetic_adapter(seed=1)
    scale = torch.ones(WIDTH, 1)
    scale[7] = 4.0
    loud = tuple(
        LoRAWeights(w.site, w.lora_A, w.lora_B * scale, w.scaling, None) for w in adapter.layers
    )
    assert identify(Adapter(loud, "loud", None, "llama", 8, RULE, ())).is_empty


def test_the_loudest_layer_does_not_decide() -> None:
    planted, shout = unit_directions(WIDTH, seed=1), unit_directions(WIDTH, seed=2)
    adapter = synthetic_adapter(planted=planted, strength=4)
    layers = list(adapter.layers)
    first = layers[0]
    loud = first.lora_B + 100 * torch.outer(shout[:, 0], torch.ones(first.lora_B.shape[1]))
    layers[0] = LoRAWeights(first.site, first.lora_A, loud, first.scaling, None)
    subspace = identify(Adapter(tuple(layers), "loud", None, "llama", 8, RULE, ()))
    assert subspace.k == 1 and cosine(subspace.bases[first.site.name], planted) > 0.95


# several sources


def test_checkpoints_are_stacked_and_their_agreement_reported() -> None:
    planted = unit_directions(WIDTH)
    sources = [synthetic_adapter(planted=planted, strength=2, seed=s) for s in range(3)]
    together, alone = identify(sources), identify(sources[0])
    assert together.stream is not None and alone.stream is not None
    assert cosine(together.stream, planted) > cosine(alone.stream, planted)
    (record,) = together.evidence["sources"]
    assert (record["kind"], len(record["values"])) == ("adapters", 3)
    assert min(record["values"]) > 0.9 and record["chance"] == pytest.approx(WIDTH**-0.5)
    assert has_reason(together, "3 adapters agree", "says only that it has settled")
    assert together.metadata["adapters"] == ["seed 0", "seed 1", "seed 2"]


def test_copies_of_noise_are_still_noise() -> None:
    """Checkpoints of one run share their noise, so flips must move them together."""
    assert identify([synthetic_adapter(seed=4)] * 3).is_empty


def test_halves_that_agree_confirm() -> None:
    planted = unit_directions(WIDTH)
    whole, *halves = (synthetic_adapter(planted=planted, strength=4, seed=s) for s in range(3))
    subspace = identify(whole, halves=halves)
    assert not subspace.is_empty and failed(subspace) == []
    assert has_reason(subspace, "seeds agree", ", at least 0.7 (a threshold from small models)")
    (record,) = subspace.evidence["sources"]
    assert record["kind"] == "halves" and record["values"][0] > 0.8
    assert not has_reason(subspace, "is not known")


def test_halves_that_disagree_refute() -> None:
    whole, *halves = (
        synthetic_adapter(planted=unit_directions(WIDTH, seed=s), strength=4, seed=s)
        for s in range(3)
    )
    alone = identify(whole)
    assert not alone.is_empty and failed(alone) == []
    subspace = identify(whole, halves=halves)
    assert subspace.is_empty and len(failed(subspace)) == 1
    sentence = ("separate data or seeds agree", ", below 0.7", "no more than 0.2", "no basis")
    assert has_reason(subspace, *sentence)
    asked = identify(whole, halves=halves, k=1)
    assert not asked.is_empty and len(failed(asked)) == 1
    assert has_reason(asked, *sentence[:2]) and not has_reason(asked, "no basis")


def test_halves_of_different_layers_can_be_compared() -> None:
    planted = unit_directions(WIDTH)
    whole = synthetic_adapter(planted=planted, strength=4)
    halves = [synthetic_adapter(planted=planted, adapted=part) for part in ([0, 1], [4, 5])]
    subspace = identify(whole, halves=halves)
    assert not subspace.is_empty and failed(subspace) == []


# explicit k, options, errors


def test_explicit_k_is_obeyed_and_tested() -> None:
    noise = identify(synthetic_adapter(), k=3)
    assert noise.k == 3 and failed(noise)
    assert has_reason(noise, "unrelated layers give", "k=3")
    planted = unit_directions(WIDTH)
    clear = identify(synthetic_adapter(planted=planted, strength=4), k=1)
    assert (clear.k, failed(clear)) == (1, [])


def test_more_directions_than_auto_allows() -> None:
    subspace = identify(synthetic_adapter(), k=20)
    assert subspace.k == 20 and len(subspace.evidence["spectra"][0]["singular_values"]) == 21


def test_k_above_the_rank() -> None:
    adapter = synthetic_adapter(rank=2, layers=3)
    assert identify(adapter, k=12).k == 12
    with pytest.raises(ValueError, match=r"k is 13, but .* 12 directions.*k ≤ 12"):
        identify(adapter, k=13)


@pytest.mark.parametrize("k", [0, -1, "many", True, 1.5])
def test_unfit_k(k: Any) -> None:
    with pytest.raises(ValueError, match=f"k is {k!r}; it must be"):
        identify(synthetic_adapter(), k=k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halves": [synthetic_adapter()]}, "1 adapters and 1 halves"),
        ({"n_iter": -1}, "n_iter is -1"),
    ],
)
def test_unfit_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        identify(synthetic_adapter(), **options)


def test_no_adapter_at_all() -> None:
    with pytest.raises(ValueError, match="0 adapters"):
        identify([])


def test_widths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"with width 64, but '.*' with 128"):
        identify([synthetic_adapter(width=128), synthetic_adapter(width=64)])


def test_an_adapter_without_writers_says_so() -> None:
    with pytest.raises(ValueError, match=r"no LoRA weights that write .*train with those"):
        identify(tiny_peft_model(("q_proj", "v_proj")))


# what is measured


def test_the_shared_spectrum_is_that_of_the_stacked_deltas() -> None:
    """Left singular vectors and values of the full matrices, each at spectral norm 1."""
    adapter = synthetic_adapter(layers=3, planted=unit_directions(WIDTH), rank=4)
    blocks = []
    for w in adapter.layers:
        delta = w.scaling * w.lora_B.double() @ w.lora_A.double()
        blocks.append(delta / torch.linalg.matrix_norm(delta, 2))
    u, s, _ = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    subspace = identify(adapter, k=2, n_iter=30)
    measured = torch.tensor(subspace.evidence["spectra"][0]["singular_values"][:2])
    assert torch.allclose(measured.double(), s[:2], rtol=1e-6, atol=0)
    assert subspace.stream is not None and cosine(subspace.stream, u[:, :2].float()) > 0.9999


@pytest.mark.parametrize("known", [True, False])
def test_writers_before_norms_are_stacked_with_their_gain(known: bool) -> None:
    adapter = synthetic_adapter(layers=2, rank=4, rule=RULES["olmo2"])
    layers = tuple(
        LoRAWeights(w.site, w.lora_A, w.lora_B, w.scaling, w.gain if known else None)
        for w in adapter.layers
    )
    blocks = []
    for w in layers:
        gain = torch.ones(WIDTH) if w.gain is None else w.gain
        delta = gain[:, None] * (w.lora_B.double() @ w.lora_A.double())
        blocks.append(delta / torch.linalg.matrix_norm(delta, 2))
    s = torch.linalg.svdvals(torch.cat(blocks, dim=1))
    source = Adapter(layers, "olmo", None, "olmo2", 2, RULES["olmo2"], ())
    subspace = identify(source, k=1, n_iter=12)
    measured = subspace.evidence["spectra"][0]["singular_values"][0]
    assert measured == pytest.approx(float(s[0]), rel=1e-4)
    assert has_reason(subspace, "norm gains are not known") == (not known)


def test_rank_deficient_and_zero_blocks() -> None:
    planted = unit_directions(WIDTH)
    adapter = synthetic_adapter(planted=planted, strength=4)
    layers = list(adapter.layers)
    a, b = layers[0], layers[1]
    layers[0] = LoRAWeights(a.site, a.lora_A, torch.zeros_like(a.lora_B), a.scaling, None)
    twice = torch.cat([b.lora_A[:4]] * 2)
    layers[1] = LoRAWeights(b.site, twice, b.lora_B, b.scaling, None)
    subspace = identify(Adapter(tuple(layers), "poor", None, "llama", 8, RULE, ()))
    assert failed(subspace) == [] and subspace.stream is not None
    assert cosine(subspace.stream, planted) > 0.95
    assert has_reason(subspace, "1 blocks are zero", a.site.name)


def test_every_writer_gets_the_basis_with_or_without_an_adapter() -> None:
    adapter = synthetic_adapter(planted=unit_directions(WIDTH), strength=4, adapted=[2, 3, 4])
    subspace = identify(adapter)
    writers = {s.name for s in RULE.sites("model.layers", range(8)) if s.role == "write"}
    assert subspace.bases.keys() == writers


def test_results_depend_on_the_generator_alone() -> None:
    adapter = synthetic_adapter(planted=unit_directions(WIDTH))
    before = torch.get_rng_state()
    first, again = identify(adapter), identify(adapter)
    other = identify(adapter, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.evidence == again.evidence and first.metadata == again.metadata
    assert other.evidence["spectra"][0]["null"] != first.evidence["spectra"][0]["null"]
    assert other.metadata["seed"] == 7 and first.metadata["seed"] == 0


def test_a_saved_peft_model_end_to_end(tmp_path: Path) -> None:
    model = tiny_peft_model()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    from_model = identify(model, k=2)
    from_folder = identify(tmp_path / "adapter", k=2, base_model=model)
    for name, basis in from_model.bases.items():
        assert cosine(basis, from_folder.bases[name]) == pytest.approx(1, abs=1e-5)
    from_model.save(tmp_path / "s.safetensors")
    loaded = Subspace.load(tmp_path / "s.safetensors")
    assert loaded.evidence == from_model.evidence and loaded.reasons == from_model.reasons
    loaded.plot(tmp_path / "s.png")
    assert loaded.summary().startswith("2 directions, shared by all layers.")
    assert failed(loaded)
