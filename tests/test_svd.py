"""Randomized SVD against torch's exact one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grasp_kernels.svd import MatrixOperator, randomized_range_finder, randomized_svd

DTYPES = (torch.float32, torch.float64)


def rounding(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 1e-12


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    left = torch.linalg.qr(torch.randn(m, len(values), generator=generator(seed)).double())[0]
    right = torch.linalg.qr(torch.randn(n, len(values), generator=generator(seed + 1)).double())[0]
    return left * values.double() @ right.mT


class Product:
    """`B A`, an operator that is never multiplied out."""

    def __init__(self, b: Tensor, a: Tensor) -> None:
        self.b, self.a = b, a
        self.shape = torch.Size((*b.shape[:-1], a.shape[-1]))
        self.dtype, self.device = b.dtype, b.device

    def matmat(self, q: Tensor) -> Tensor:
        return self.b @ (self.a @ q)

    def rmatmat(self, q: Tensor) -> Tensor:
        return self.a.mT @ (self.b.mT @ q)


def factored_svdvals(b: Tensor, a: Tensor) -> Tensor:
    """Exact in float64: QR of both factors, SVD of the small product."""
    rb = torch.linalg.qr(b.double())[1]
    ra = torch.linalg.qr(a.double().mT)[1]
    return torch.linalg.svdvals(rb @ ra.mT)


def distance_from_orthonormal(columns: Tensor) -> float:
    eye = torch.eye(columns.shape[-1], dtype=torch.float64)
    return float((columns.double().mT @ columns.double() - eye).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 300, 16), (64, 500, 8), (17, 16, 12)])
def test_factored_values_are_exact(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, n, r = shape
    b, a = torch.randn(m, r, dtype=dtype), torch.randn(r, n, dtype=dtype)
    u, s, vh = randomized_svd(Product(b, a), 8)
    expected = factored_svdvals(b, a)[:8]
    assert ((s - expected) / expected).abs().max() <= rounding(dtype)
    assert s.dtype == u.dtype == vh.dtype == dtype
    assert distance_from_orthonormal(u) < 10 * rounding(dtype)
    assert distance_from_orthonormal(vh.mT) < 10 * rounding(dtype)


def test_small_values_survive_the_power_iterations() -> None:
    """Without the QR between the products everything below eps^(1/9) of the top would be noise."""
    values = torch.logspace(0, -9, 10)
    matrix = with_spectrum(60, 50, values)
    s = randomized_svd(matrix, 10, n_iter=4)[1]
    assert ((s - values) / values).abs().max() < 1e-5


def test_power_iterations_sharpen_a_slow_spectrum() -> None:
    matrix = with_spectrum(200, 150, torch.linspace(1, 0.5, 150))
    exact = torch.linalg.svdvals(matrix)[:4]
    errors = [
        float(((exact - randomized_svd(matrix, 4, n_iter=n)[1]) / exact).max()) for n in (0, 2, 8)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    data=st.data(),
    batch=st.sampled_from([(), (1,), (2, 3)]),
    seed=st.integers(0, 2**31),
)
def test_close_to_the_best_approximation(
    m: int, n: int, data: st.DataObject, batch: tuple[int, ...], seed: int
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    matrix = torch.randn(*batch, m, n, generator=generator(seed), dtype=torch.float64)
    u, s, vh = randomized_svd(matrix, rank, generator=generator(seed))
    assert u.shape == (*batch, m, rank) and vh.shape == (*batch, rank, n)
    assert distance_from_orthonormal(u) < 1e-10 and distance_from_orthonormal(vh.mT) < 1e-10
    assert bool((s[..., :-1] >= s[..., 1:]).all())
    tail = torch.linalg.svdvals(matrix)[..., rank:].square().sum(dim=-1).sqrt()
    error = torch.linalg.matrix_norm(matrix - (u * s[..., None, :]) @ vh)
    assert bool((error <= 1.05 * tail + 1e-10).all())


def test_batches_are_the_same_as_one_by_one() -> None:
    matrices = torch.randn(3, 12, 9, dtype=torch.float64)
    s = randomized_svd(matrices, 5)[1]
    assert torch.allclose(s, torch.linalg.svdvals(matrices)[..., :5], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    matrix = torch.randn(20, 10).to(dtype)
    u, s, vh = randomized_svd(matrix, 10)
    assert u.dtype == s.dtype == vh.dtype == torch.float32
    assert torch.allclose(s, torch.linalg.svdvals(matrix.float()), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 4, 3)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    u, s, vh = randomized_svd(torch.zeros(shape), 2)
    assert (u.shape, s.shape, vh.shape) == (
        (*shape[:-2], 4, 2),
        (*shape[:-2], 2),
        (*shape[:-2], 2, 3),
    )


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_single_row_or_column(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    u, s, vh = randomized_svd(matrix, 1)
    assert torch.allclose(u * s @ vh, matrix, atol=1e-6)


def test_zero_and_rank_deficient() -> None:
    u, s, _ = randomized_svd(torch.zeros(6, 5), 3)
    assert not s.any() and distance_from_orthonormal(u) < 1e-6
    deficient = torch.outer(torch.arange(1.0, 7), torch.ones(5))
    u, s, vh = randomized_svd(deficient, 3)
    assert float(s[1]) < 1e-5 * float(s[0])
    assert distance_from_orthonormal(u) < 1e-5
    assert torch.allclose(u * s @ vh, deficient, atol=1e-4)


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    matrix = torch.randn(80, 70)
    before = torch.get_rng_state()
    first = randomized_svd(matrix, 3, n_iter=0, n_oversamples=0)
    again = randomized_svd(matrix, 3, n_iter=0, n_oversamples=0)
    other = randomized_svd(matrix, 3, n_iter=0, n_oversamples=0, generator=generator(1))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_products_alone_are_enough() -> None:
    b, a = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(2, 6, 6, dtype=torch.float64)
    u, s, vh = randomized_svd(Product(b, a), 6)
    assert torch.allclose(s, torch.linalg.svdvals(b @ a), rtol=1e-12)
    assert torch.allclose(u * s[..., None, :] @ vh, b @ a, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_same_generator_gives_the_same_basis_in_any_dtype(dtype: torch.dtype) -> None:
    matrix = torch.randn(40, 30).bfloat16()
    narrow, wide = (
        randomized_range_finder(
            MatrixOperator(matrix.to(kind)), 4, n_iter=0, generator=generator(0)
        )
        for kind in (torch.float32, dtype)
    )
    assert torch.allclose(narrow.double(), wide.double(), atol=1e-5)


def test_a_matrix_has_a_gradient() -> None:
    matrix = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(randomized_svd(matrix, 4)[1].sum(), matrix)
    (exact,) = torch.autograd.grad(torch.linalg.svdvals(matrix).sum(), matrix)
    assert torch.allclose(found, exact, atol=1e-9)


def test_range_finder_gives_an_orthonormal_basis_of_the_range() -> None:
    matrix = with_spectrum(40, 30, torch.ones(5))
    q = randomized_range_finder(MatrixOperator(matrix), 5, n_iter=1, generator=generator(0))
    assert distance_from_orthonormal(q) < 1e-10
    assert torch.allclose(q @ (q.mT @ matrix), matrix, atol=1e-10)


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}, but a 5 × 9 matrix has between 1 and 5"):
        randomized_svd(torch.randn(5, 9), rank)


@pytest.mark.parametrize("options", [{"n_oversamples": -1}, {"n_iter": -2}])
def test_negative_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="both must be at least 0"):
        randomized_svd(torch.randn(5, 9), 2, **options)  # type: ignore[arg-type]


def test_unfit_inputs() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) of torch.float32"):
        randomized_svd(torch.randn(3), 1)
    with pytest.raises(ValueError, match=r"of torch\.int64"):
        randomized_svd(torch.ones(3, 3, dtype=torch.int64), 1)
