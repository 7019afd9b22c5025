"""The subspace as a value: what it accepts, what it keeps, what it says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from grasp_kernels.models.architectures import RULES
from grasp_kernels.subspace import Subspace, orthonormal
from tests.helpers.oracle import budget, relative_error
from tests.helpers.synthetic import RULE, unit_directions, writers

SITES = writers(RULE, range(3))
BEFORE_NORMS = writers(RULES["olmo2"], range(3))
WIDTH = 24


def some_subspace(**options: Any) -> Subspace:
    options = {"metadata": {"adapters": ["a"]}, **options}
    gains = {str(site.norm): torch.rand(WIDTH) + 0.5 for site in BEFORE_NORMS}
    return Subspace(unit_directions(WIDTH, 2), **{"gains": gains, **options})


def test_one_basis_serves_every_writer() -> None:
    subspace = some_subspace()
    assert subspace.k == 2
    assert all(subspace.at(site) is subspace.basis for site in SITES)


@pytest.mark.parametrize("given", [False, True])
def test_writers_before_norms_have_their_gain(given: bool) -> None:
    subspace = some_subspace()
    for site in BEFORE_NORMS:
        gain = torch.rand(WIDTH) + 0.5 if given else subspace.gains[str(site.norm)]
        basis = subspace.at(site, gain if given else None)
        behind = gain[:, None] * subspace.basis
        limit = 2 * budget(0.0, torch.float32, WIDTH)  # the basis is rounded, and the product
        assert relative_error(basis @ (basis.mT @ behind), behind) <= limit
        assert relative_error(basis @ (basis.mT @ subspace.basis), subspace.basis) > 0.1


def test_an_unknown_gain_counts_as_one() -> None:
    subspace = some_subspace(gains={})
    assert all(torch.equal(subspace.at(site), subspace.basis) for site in BEFORE_NORMS)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 6), width=st.integers(6, 40), seed=st.integers(0, 2**31))
def test_orthonormal_keeps_span_and_signs(k: int, width: int, seed: int) -> None:
    columns = torch.randn(width, k, generator=torch.Generator().manual_seed(seed)) * 10
    basis = Subspace(orthonormal("x", columns)).basis
    limit = 2 * budget(0.0, torch.float32, width)  # the basis is rounded, and the product
    assert relative_error(basis @ (basis.mT @ columns), columns) <= limit
    assert float(basis[:, 0] @ columns[:, 0]) > 0


@pytest.mark.parametrize("gains", [True, False])
def test_round_trip_through_a_file(tmp_path: Path, gains: bool) -> None:
    before = some_subspace(notes=("ünsure",), **({} if gains else {"gains": {}}))
    before.save(tmp_path / "s.safetensors")
    after = Subspace.load(tmp_path / "s.safetensors")
    assert torch.equal(before.basis, after.basis)
    assert before.gains.keys() == after.gains.keys()
    assert all(torch.equal(gain, after.gains[norm]) for norm, gain in before.gains.items())
    assert (before.notes, before.metadata) == (after.notes, after.metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("length", range(0, 64, 8))
def test_a_basis_stands_where_torch_puts_tensors(tmp_path: Path, length: int) -> None:
    """Not where the length of the header puts it: products round with the place."""
    some_subspace(notes=("x" * length,)).save(tmp_path / "s.safetensors")
    basis = Subspace.load(tmp_path / "s.safetensors").basis
    assert basis.data_ptr() % 64 == torch.empty(9).data_ptr() % 64


@pytest.mark.parametrize(
    ("basis", "kind", "message"),
    [
        (unit_directions(8).double(), TypeError, "basis is torch.float64; convert"),
        (unit_directions(8).bfloat16(), TypeError, "basis is torch.bfloat16; convert"),
        (torch.ones(8), ValueError, r"basis has shape \(8,\)"),
        (torch.eye(3)[:2], ValueError, r"basis has shape \(2, 3\)"),
        (torch.ones(8, 0), ValueError, r"basis has shape \(8, 0\)"),
        (torch.full((8, 1), float("nan")), ValueError, "basis has non-finite values"),
        (unit_directions(8) * 1.001, ValueError, "basis is not orthonormal .* = 0.002"),
        (torch.ones(8, 2) / 8**0.5, ValueError, "basis is not orthonormal"),
    ],
)
def test_unfit_bases(basis: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Subspace(basis)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.ones(WIDTH, 2), "are dependent"),
        (torch.zeros(WIDTH, 1), "zero or non-finite"),
        (torch.full((WIDTH,), float("inf")), "zero or non-finite"),
        (torch.ones(2, 2, 2), r"shape \(2, 2, 2\)"),
    ],
)
def test_directions_that_span_nothing(directions: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthonormal("x", directions)


def test_gain_of_another_width() -> None:
    wide, site = torch.ones(WIDTH + 1), BEFORE_NORMS[0]
    with pytest.raises(ValueError, match=r"shape \(25,\), but the directions have width 24"):
        some_subspace(gains={str(site.norm): wide})
    with pytest.raises(ValueError, match=r"shape \(25,\), but the directions have width 24"):
        some_subspace().at(site, wide)


def test_loading_what_is_no_subspace(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no subspace file .*missing\.safetensors"):
        Subspace.load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        Subspace.load(tmp_path / "text.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="does not hold a valid subspace"):
        Subspace.load(tmp_path / "foreign.safetensors")


def test_nothing_is_written_when_saving_fails(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    some_subspace().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        some_subspace(metadata={"x": float("nan")}).save(path)
    with pytest.raises(
        FileNotFoundError, match=r"absent.*' cannot be written \(no such file or directory\)"
    ):
        some_subspace().save(tmp_path / "absent" / "s.safetensors")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_summary_has_the_number_of_directions_and_the_notes() -> None:
    text = some_subspace(notes=("a spectrum",)).summary()
    assert text == "2 directions of a residual stream of width 24.\n- a spectrum"
    one = Subspace(unit_directions(WIDTH))
    assert one.summary() == "1 direction of a residual stream of width 24."
