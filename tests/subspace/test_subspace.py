"""The subspace as a value: what it accepts, what it keeps, what it shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp_kernels.models.architectures import RULES, Site
from grasp_kernels.subspace import Subspace, check_basis, orthonormal
from tests.helpers.synthetic import RULE, unit_directions

SITES = tuple(RULE.sites("model.layers", range(3)))
BEHIND_NORMS = tuple(RULES["olmo2"].sites("model.layers", range(3)))
WIDTH = 24
EVIDENCE = {
    "spectra": [
        {
            "k": 2,
            "singular_values": [3.0, 2.5, 0.9],
            "null": [1.2, 1.2, 1.2],
            "gap": 2.8,
        }
    ],
    "agreement": [{"layers": [0, 1, 2], "values": [0.9, 0.8, 0.7], "chance": 0.2}],
}


def some_subspace(sites: tuple[Site, ...] = SITES, **options: Any) -> Subspace:
    gains = {site.norm: torch.rand(WIDTH) + 0.5 for site in sites if site.norm}
    options = {"evidence": EVIDENCE, "metadata": {"source": "weights"}, **options}
    basis = options.pop("basis", unit_directions(WIDTH, 2))
    return Subspace.from_stream(basis, sites, gains=gains, **options)


def bases_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(first[n].equal(second[n]) for n in first)


def test_shared_bases_reach_every_writer_and_no_reader() -> None:
    stream = unit_directions(WIDTH, 2)
    subspace = Subspace.from_stream(stream, SITES)
    assert subspace.stream is not None and torch.allclose(subspace.stream, stream, atol=1e-6)
    assert subspace.bases.keys() == {site.name for site in SITES if site.role == "write"}
    assert all(basis is subspace.stream for basis in subspace.bases.values())


def test_bases_of_writers_before_norms_have_their_gain() -> None:
    stream = unit_directions(WIDTH, 2)
    gains = {site.norm: torch.rand(WIDTH) + 0.5 for site in BEHIND_NORMS if site.norm}
    subspace = Subspace.from_stream(stream, BEHIND_NORMS, gains=gains)
    for site in BEHIND_NORMS:
        if site.norm:
            basis = subspace.bases[site.name]
            behind = gains[site.norm][:, None] * stream
            assert torch.allclose(basis @ (basis.mT @ behind), behind, atol=1e-5)
            assert not torch.allclose(basis @ (basis.mT @ stream), stream, atol=1e-2)


def test_an_unknown_gain_counts_as_one() -> None:
    subspace = Subspace.from_stream(unit_directions(WIDTH), BEHIND_NORMS)
    assert all(torch.allclose(b, unit_directions(WIDTH)) for b in subspace.bases.values())


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 6), width=st.integers(6, 40), seed=st.integers(0, 2**31))
def test_orthonormal_keeps_span_and_signs(k: int, width: int, seed: int) -> None:
    columns = torch.randn(width, k, generator=torch.Generator().manual_seed(seed)) * 10
    basis = orthonormal("x", columns)
    check_basis("x", basis)
    assert torch.allclose(basis @ (basis.mT @ columns), columns, atol=1e-3)
    assert float(basis[:, 0] @ columns[:, 0]) > 0


@pytest.mark.parametrize("sites", [SITES, BEHIND_NORMS], ids=["plain", "behind norms"])
def test_round_trip_through_a_file(tmp_path: Path, sites: Any) -> None:
    before = some_subspace(sites, reasons=["ünsure"])
    before.save(tmp_path / "s.safetensors")
    after = Subspace.load(tmp_path / "s.safetensors")
    assert bases_equal(before.bases, after.bases)
    assert (before.stream is None) == (after.stream is None)
    for name in ("k", "reasons", "evidence", "metadata"):
        assert getattr(before, name) == getattr(after, name)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_each_basis_is_stored_once(tmp_path: Path) -> None:
    some_subspace().save(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["basis.0"]


@pytest.mark.parametrize("length", range(0, 64, 8))
def test_bases_stand_where_torch_puts_tensors(tmp_path: Path, length: int) -> None:
    """Not where the length of the header puts them: products round with the place."""
    some_subspace(reasons=["x" * length]).save(tmp_path / "s.safetensors")
    stream = Subspace.load(tmp_path / "s.safetensors").stream
    assert stream is not None and stream.data_ptr() % 64 == torch.empty(9).data_ptr() % 64


def test_the_empty_subspace_round_trips(tmp_path: Path) -> None:
    empty = Subspace.empty(["no evidence"])
    empty.save(tmp_path / "n.safetensors")
    after = Subspace.load(tmp_path / "n.safetensors")
    assert after.is_empty and after.k == 0 and after.reasons == ("no evidence",)


# what formats wrote beside or in place of what is written now
OLD = {
    1: {"verdict": "found", "side": "write", "scope": "shared"},
    2: {"side": "write", "scope": "shared"},
    3: {"side": "write"},
}


def written_before(path: Path, subspace: Subspace, version: int, **changes: Any) -> None:
    """The file of a subspace as an older format had it, with bases of a kind for each side."""
    key = "grasp_kernels.subspace.basis"
    subspace.save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[key])
    assert header["version"] == 4 and not {"verdict", "side", "scope"} & set(header)
    header |= {"version": version, "write": header.pop("bases"), "read": {}}
    header |= {**OLD[version], **changes}
    save_file(tensors, path, metadata={key: json.dumps(header)})


@pytest.mark.parametrize("version", OLD)
@pytest.mark.parametrize("empty", [False, True])
def test_files_of_older_formats_are_read(tmp_path: Path, version: int, empty: bool) -> None:
    path = tmp_path / "s.safetensors"
    before = some_subspace(reasons=["ünsure"])
    if empty:
        before = Subspace.empty(["ünsure"])
    written_before(path, before, version)
    after = Subspace.load(path)
    assert bases_equal(before.bases, after.bases)
    assert (after.k, after.reasons) == (before.k, ("ünsure",))
    assert (after.stream is None) == empty and not hasattr(after, "verdict")


@pytest.mark.parametrize(
    ("version", "option", "value"),
    [
        *((version, "side", side) for version in OLD for side in ("read", "both")),
        *((version, "scope", "layer") for version in (1, 2)),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_subspaces_that_are_no_longer_used(
    tmp_path: Path, version: int, option: str, value: str, empty: bool
) -> None:
    path = tmp_path / "s.safetensors"
    before = Subspace.empty([]) if empty else some_subspace()
    written_before(path, before, version, **{option: value})
    said = rf"s\.safetensors' holds .*\({option} is '{value}'\).* anew with `grasp-kernels ident"
    with pytest.raises(ValueError, match=said):
        Subspace.load(path)


def with_basis(basis: Tensor, **changes: Any) -> Subspace:
    return Subspace({"m": basis}, None, **{"k": 1, **changes})


@pytest.mark.parametrize(
    ("basis", "kind", "message"),
    [
        (unit_directions(8).double(), TypeError, "'m' is torch.float64; convert"),
        (unit_directions(8).bfloat16(), TypeError, "'m' is torch.bfloat16; convert"),
        (torch.ones(8), ValueError, r"'m' has shape \(8,\)"),
        (torch.eye(3)[:2], ValueError, r"'m' has shape \(2, 3\)"),
        (torch.ones(8, 0), ValueError, r"'m' has shape \(8, 0\)"),
        (torch.full((8, 1), float("nan")), ValueError, "'m' has non-finite values"),
        (unit_directions(8) * 1.001, ValueError, "'m' is not orthonormal .* = 0.002"),
        (torch.ones(8, 2) / 8**0.5, ValueError, "'m' is not orthonormal"),
    ],
)
def test_unfit_bases(basis: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        with_basis(basis, k=basis.shape[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 2}, "k is 2, but the widest basis has 1"),
        ({"k": 0}, "k is 0, but the widest basis has 1"),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_basis(unit_directions(8), **changes)


def test_directions_without_bases_are_a_contradiction() -> None:
    with pytest.raises(ValueError, match="k is 1, but the widest basis has 0"):
        Subspace({}, None, 1)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.ones(WIDTH, 2), "linearly dependent"),
        (torch.zeros(WIDTH, 1), "zero or non-finite"),
        (torch.full((WIDTH,), float("inf")), "zero or non-finite"),
        (torch.ones(2, 2, 2), r"shape \(2, 2, 2\)"),
    ],
)
def test_directions_that_span_nothing(directions: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subspace.from_stream(directions, SITES)


def test_gain_of_another_width() -> None:
    gains = {"model.layers.0.post_attention_layernorm": torch.ones(WIDTH + 1)}
    with pytest.raises(ValueError, match=r"shape \(25,\), but the directions have width 24"):
        Subspace.from_stream(unit_directions(WIDTH), BEHIND_NORMS, gains=gains)


def test_no_site_for_the_directions() -> None:
    readers = [Site("model.layers.0.mlp.up_proj", 0, "read", None)]
    with pytest.raises(ValueError, match="None of the sites writes to the stream"):
        Subspace.from_stream(unit_directions(WIDTH), readers)


def test_loading_what_is_no_subspace(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no subspace file .*missing\.safetensors"):
        Subspace.load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="is no safetensors file"):
        Subspace.load(tmp_path / "text.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="holds no subspace"):
        Subspace.load(tmp_path / "foreign.safetensors")
    header = json.dumps({"version": 99})
    save_file({}, tmp_path / "new.safetensors", metadata={"grasp_kernels.subspace.basis": header})
    with pytest.raises(ValueError, match=r"format 99.*upgrade"):
        Subspace.load(tmp_path / "new.safetensors")


def test_nothing_is_written_when_saving_fails(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    some_subspace().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        some_subspace(metadata={"x": float("nan")}).save(path)
    with pytest.raises(FileNotFoundError, match=r"'.*absent' does not exist"):
        some_subspace().save(tmp_path / "absent" / "s.safetensors")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("basis", "said"),
    [
        (unit_directions(WIDTH, 1), "1 direction, shared by all layers. 6 modules have a basis."),
        (unit_directions(WIDTH, 2), "2 directions, shared by all layers. 6 modules have a basis."),
    ],
)
def test_summary_begins_with_the_number_of_directions(basis: Any, said: str) -> None:
    assert some_subspace(basis=basis).summary().startswith(said)


def test_summary_of_an_empty_subspace() -> None:
    text = Subspace.empty(["as noise"], evidence=EVIDENCE).summary()
    assert text.startswith("No direction stands above chance.\n")
    assert "3.000 (1.200)" in text and text.endswith("- as noise")


def test_summary_shows_numbers_and_reasons() -> None:
    text = some_subspace(reasons=["only a few layers"]).summary()
    assert "3.000 (1.200)  2.500 (1.200)  0.900 (1.200)" in text
    assert "median 0.80, lowest 0.70, by chance 0.20" in text
    assert text.endswith("- only a few layers")


def test_plot_writes_a_png(tmp_path: Path) -> None:
    some_subspace().plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_plot_needs_spectra(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no spectra in its evidence"):
        some_subspace(evidence={}).plot(tmp_path / "p.png")
