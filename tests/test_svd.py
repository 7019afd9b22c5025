"""The leading triples of a matrix: close to the exact ones, and the same in every run."""

import pytest
import torch
from torch import Tensor

from grasp_kernels.svd import leading_triples
from tests.helpers.oracle import budget, relative_error


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix `[m, n]` with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator).double())[0]
        for size in (m, n)
    )
    return left * values.double() @ right.mT


@pytest.mark.parametrize(("m", "n"), [(40, 300), (300, 40), (12, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triples_of_low_rank_are_exact_to_rounding(m: int, n: int, dtype: torch.dtype) -> None:
    exact = torch.linspace(9, 1, 8)
    matrix = with_spectrum(m, n, exact).to(dtype)
    U, S, Vh = leading_triples(matrix, 8)
    assert (U.shape, S.shape, Vh.shape) == ((m, 8), (8,), (8, n)) and S.dtype == dtype
    limit = 8 * budget(0.0, dtype, max(m, n))
    assert relative_error(S, exact) <= max(limit, 1e-7)  # linspace is of float32
    assert relative_error(U * S @ Vh, matrix) <= limit
    for columns in (U, Vh.mT):
        assert relative_error(columns.mT @ columns, torch.eye(8)) <= limit


def test_values_of_a_slow_spectrum_are_within_the_theorem() -> None:
    """`(σ_{rank + 9} / σ_j)^18` of each value, and what float64 rounds."""
    exact = 0.8 ** torch.arange(30)
    _, S, _ = leading_triples(with_spectrum(60, 80, exact), 5)
    error = (exact[:5] - S) / exact[:5]
    assert (error.abs() <= (exact[13] / exact[:5]) ** 18 + 1e-6).all()


def test_the_same_in_every_run_and_random_numbers_are_left_alone() -> None:
    matrix, state = torch.randn(30, 50), torch.get_rng_state()
    first, again = leading_triples(matrix, 3), leading_triples(matrix, 3)
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)


def test_half_precision_is_computed_in_float32() -> None:
    matrix = torch.randn(20, 30).bfloat16()
    _, S, _ = leading_triples(matrix, 2)
    assert S.dtype == torch.float32
    assert relative_error(S, torch.linalg.svdvals(matrix.double())[:2]) <= 1e-3


def test_a_zero_matrix_has_zero_values() -> None:
    assert not leading_triples(torch.zeros(6, 5), 3)[1].any()
