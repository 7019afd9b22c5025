"""The Gaussian sketch: its numbers against the published ones, its backends against each other."""

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grasp_kernels.ops import dispatch
from grasp_kernels.ops.sketch import reference
from grasp_kernels.ops.sketch.api import BACKENDS, gaussian_sketch

PACKAGE = "grasp_kernels.ops.sketch"
GPU = torch.device("cuda")
ON_GPU = torch.cuda.is_available() and dispatch.why_not(PACKAGE, "triton", GPU) is None
DEVICE = GPU if ON_GPU else torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASK = 0xFFFFFFFF

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sketch(matrix: Tensor, size: int, backend: str, seed: int = 7) -> Tensor:
    return gaussian_sketch(matrix, size, generator(seed), backend=backend)


def omega(batch: tuple[int, ...], n: int, size: int, dtype: torch.dtype, backend: str) -> Tensor:
    """`Ω[..., N, L]` as the sketch of the identity, float64 on the CPU."""
    identity = torch.eye(n, dtype=dtype, device=DEVICE).expand(*batch, n, n)
    return sketch(identity, size, backend).double().cpu()


# the generator

# Random123 1.09, known-answer vectors of philox4x32-10: counter, key, result.
KNOWN = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def as_signed(key: tuple[int, int]) -> int:
    seed = key[1] << 32 | key[0]
    return seed - 2**64 if seed >= 2**63 else seed


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    keys = reference.round_keys(as_signed(key), DEVICE)
    words = tuple(torch.tensor([word], device=DEVICE) for word in counter)
    even, odd = reference.philox(words, keys)
    assert tuple(int(w) & MASK for w in (even[0], odd[0], even[1], odd[1])) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_triton_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def words(counter, seed, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, BLOCK)
        c0, c1, c2, c3 = (
            tl.load(counter + i * 0).to(tl.uint32),
            tl.load(counter + i * 0 + 1).to(tl.uint32),
            tl.load(counter + i * 0 + 2).to(tl.uint32),
            tl.load(counter + i * 0 + 3).to(tl.uint32),
        )
        w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
        tl.store(out + i, w0.to(tl.int64))
        tl.store(out + BLOCK + i, w1.to(tl.int64))
        tl.store(out + 2 * BLOCK + i, w2.to(tl.int64))
        tl.store(out + 3 * BLOCK + i, w3.to(tl.int64))

    # the kernel's own module is where triton and tl are looked up
    words.fn.__globals__.update(triton=triton, tl=tl)
    out = torch.empty(4, 4, dtype=torch.int64, device=DEVICE)
    numbers = torch.tensor(counter, device=DEVICE), torch.tensor([as_signed(key)], device=DEVICE)
    words[(1,)](*numbers, out, BLOCK=4)
    assert tuple(out[:, 0].tolist()) == expected


def box_muller(seed: int, b: int, n: int, column: int) -> float:
    """One entry of `Ω` in double precision, from the definition."""
    counter = (column // 4, n, b, 0)
    words = tuple(torch.tensor([word]) for word in counter)
    even, odd = reference.philox(words, reference.round_keys(seed, torch.device("cpu")))
    pair = column // 2 % 2
    radius_word, angle_word = int(even[pair]) & MASK, int(odd[pair]) & MASK
    radius = math.sqrt(-2 * math.log((radius_word % 2**31) * 2.0**-31 + 2.0**-32))
    angle = 2 * math.pi * angle_word / 2**32
    return radius * (math.sin(angle) if column % 2 else math.cos(angle))


@each_backend
def test_every_entry_follows_from_its_indices(backend: str) -> None:
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator()))
    found = omega((2, 3), 66, 70, torch.float32, backend).reshape(6, 66, 70)
    for b, n, column in [(0, 0, 0), (0, 65, 69), (5, 17, 1), (3, 64, 34), (4, 33, 3)]:
        assert abs(float(found[b, n, column]) - box_muller(seed, b, n, column)) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 22, 70])
def test_both_backends_have_the_same_test_matrix(dtype: torch.dtype, size: int) -> None:
    expected, found = (omega((2,), 100, size, dtype, name) for name in ("reference", "triton"))
    # float32 rounding, and one unit of a narrower dtype where that decides between neighbours
    narrow = torch.finfo(dtype).eps if torch.finfo(dtype).bits == 16 else 0.0
    assert bool(((found - expected).abs() <= 1e-6 + narrow * expected.abs()).all())
    if narrow:
        assert float((found != expected).double().mean()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_backend
def test_the_test_matrix_is_rounded_to_the_dtype(dtype: torch.dtype, backend: str) -> None:
    found = omega((), 40, 12, dtype, backend)
    exact = omega((), 40, 12, torch.float32, backend)
    assert torch.equal(found, exact.to(dtype).double())


def test_blocks_are_parts_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(5, 3, 100)
    whole, test = sketch(matrix, 10, "reference"), omega((5,), 100, 10, torch.float32, "reference")
    keys = reference.round_keys(3, torch.device("cpu"))
    part = reference.gaussian(keys, range(1, 3), range(90, 95), 5)
    assert torch.equal(
        part, reference.gaussian(keys, range(4), range(100), 9)[1:3, 90:95, :5]
    )  # a wider, longer, deeper Ω begins with the narrower
    monkeypatch.setattr(reference, "_BLOCK", 30)  # 10 rows: many blocks of columns
    assert torch.allclose(sketch(matrix, 10, "reference"), whole, atol=1e-5)
    assert torch.equal(omega((5,), 100, 10, torch.float32, "reference"), test)
    monkeypatch.setattr(reference, "_BLOCK", 700)  # 233 rows: two batch members, then one
    assert torch.allclose(sketch(matrix, 10, "reference"), whole, atol=1e-5)


# the numbers are Gaussian and independent


@each_backend
def test_distribution(backend: str) -> None:
    identity = torch.eye(256, device=DEVICE).expand(4, 256, 256)
    numbers = sketch(identity, 64, backend).double().cpu().flatten()
    count = numbers.numel()  # 65536
    assert abs(float(numbers.mean())) < 4 / count**0.5
    assert abs(float(numbers.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((numbers**4).mean()) - 3) < 4 * (96 / count) ** 0.5
    # Kolmogorov and Smirnov's distance; 1.95 / √n is exceeded once in a thousand
    ranks = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = (torch.special.ndtr(numbers.sort().values) - ranks).abs().max()
    assert float(distance) < 1.95 / count**0.5


@each_backend
def test_columns_rows_and_batch_members_are_independent(backend: str) -> None:
    """Correlations of what neighbours in a counter, in a block and in a batch share nothing of."""
    numbers = omega((3,), 256, 24, torch.float32, backend)
    columns = numbers.transpose(0, 1).reshape(256, -1)  # [n, (b, l)]
    for table in (columns, columns.square() - 1):  # the pairs of Box and Muller share a radius
        unit = table / table.norm(dim=0)
        gram = (unit.mT @ unit - torch.eye(72, dtype=torch.float64)).abs()
        assert float(gram.max()) < 5.5 / 256**0.5
    rows = numbers.transpose(0, 1).flatten(1)
    unit = rows / rows.norm(dim=1, keepdim=True)
    gram = (unit @ unit.mT - torch.eye(256, dtype=torch.float64)).abs()
    assert float(gram.max()) < 5.5 / 72**0.5


@each_backend
def test_one_number_is_drawn_and_the_global_generator_is_left_alone(backend: str) -> None:
    used, counted = generator(), generator()
    before = torch.get_rng_state()
    matrix = torch.ones(4, 4, device=DEVICE)
    first = gaussian_sketch(matrix, 2, used, backend=backend)
    torch.randint(2**63 - 1, (1,), generator=counted)
    assert torch.equal(used.get_state(), counted.get_state())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(gaussian_sketch(matrix, 2, generator(), backend=backend), first)
    assert not torch.equal(gaussian_sketch(matrix, 2, used, backend=backend), first)


# the product

SHAPES = [
    ((), 1, 1, 1),
    ((), 3, 300, 17),  # few rows: split along N
    ((), 130, 40, 70),
    ((2, 3), 5, 33, 6),
    ((1,), 65, 129, 24),
]


def assert_close_to_the_oracle(matrix: Tensor, size: int, backend: str) -> None:
    """Within 1.5 times the error of a plain product, plus the last bit.

    The error of a float64 product is taken to be that of the float32 one, scaled.
    """
    found = sketch(matrix, size, backend)
    work = torch.promote_types(matrix.dtype, torch.float32)
    test = omega(matrix.shape[:-2], matrix.shape[-1], size, matrix.dtype, backend)
    exact = matrix.double().cpu() @ test
    rounded = matrix.cpu().float(), test.float()
    plain = (rounded[0] @ rounded[1]).double() - rounded[0].double() @ rounded[1].double()
    unit = torch.finfo(work).eps
    budget = 1.5 * plain.norm() * unit / torch.finfo(torch.float32).eps + unit * exact.norm()
    assert found.shape == exact.shape and found.dtype == work
    assert float((found.double().cpu() - exact).norm()) <= float(budget)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_product(
    shape: tuple[tuple[int, ...], int, int, int], dtype: torch.dtype, backend: str
) -> None:
    batch, m, n, size = shape
    matrix = torch.randn(*batch, m, n, generator=generator(1)).to(DEVICE, dtype)
    assert_close_to_the_oracle(matrix, size, backend)


@each_backend
def test_any_strides(backend: str) -> None:
    base = torch.randn(2, 70, 3, 50, generator=generator(2)).to(DEVICE)
    for matrix in (
        base[:, :, 1].mT,
        base[:, ::3, 0, ::2],
        base.permute(2, 0, 1, 3),  # a batch whose dimensions do not merge
        base[0, :1, 0].expand(6, 50),
        base[:1, :, 0].expand(3, 70, 50),
    ):
        assert_close_to_the_oracle(matrix, 9, backend)


@each_backend
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 4, 3), (2, 0, 5), (0, 5), (5, 0), (2, 5, 0)])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    found = sketch(torch.zeros(shape, device=DEVICE), 2, backend)
    assert found.shape == (*shape[:-1], 2) and not found.any()


@each_backend
def test_the_same_bits_again(backend: str) -> None:
    matrix = torch.randn(3, 700, generator=generator(3)).to(DEVICE)
    assert torch.equal(sketch(matrix, 5, backend), sketch(matrix, 5, backend))


def test_parts_along_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from grasp_kernels.ops.gpu.launch import PARTS
    from grasp_kernels.ops.sketch import triton

    matrix = torch.randn(3, 2000, generator=generator(3)).to(DEVICE, torch.bfloat16)
    expected = sketch(matrix, 5, "reference")
    made, launch = [], triton.launch

    def spy(*arguments: Any, **named: Any) -> None:
        made.append(len(named["partial"]))
        launch(*arguments, **named)

    monkeypatch.setattr(triton, "launch", spy)
    for processors in (1, 2, 132):
        part = replace(PARTS["sm_90"], multiprocessors=processors)
        monkeypatch.setattr(triton, "part_of", lambda where, part=part: part)
        assert torch.allclose(sketch(matrix, 5, "triton"), expected, rtol=0, atol=1e-4)
    assert made == [2, 4, 8]  # of 32 blocks of columns, 4 or more each


def test_a_part_that_forgets_its_place_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers in every part of N: what a lost offset of the counter would give."""
    matrix = torch.randn(3, 2000, generator=generator(3))
    expected, right = sketch(matrix, 5, "reference"), reference.gaussian
    monkeypatch.setattr(reference, "_BLOCK", 400)
    assert torch.allclose(sketch(matrix, 5, "reference"), expected, rtol=0, atol=1e-4)
    monkeypatch.setattr(
        reference, "gaussian", lambda keys, b, n, size: right(keys, b, range(len(n)), size)
    )
    assert not torch.allclose(sketch(matrix, 5, "reference"), expected, rtol=0, atol=1e-4)


# choice of a backend, errors, gradient


def test_auto_takes_the_reference_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from grasp_kernels.ops.sketch import triton

    monkeypatch.delattr(triton, "sketch")
    matrix = torch.randn(5, 9)
    assert torch.equal(sketch(matrix, 3, "auto"), sketch(matrix, 3, "reference"))


def test_the_cpu_needs_no_triton() -> None:
    code = (
        "import sys, torch\nfrom grasp_kernels import randomized_svd\n"
        "randomized_svd(torch.ones(5, 9), 2)\nprint('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_unfit_inputs() -> None:
    matrix = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"shape \(3,\) of torch\.float32; convert"):
        sketch(matrix[0], 1, "auto")
    with pytest.raises(ValueError, match=r"of torch\.int64; convert"):
        sketch(matrix.long(), 1, "auto")
    with pytest.raises(ValueError, match=r"size is 0; a sketch has at least 1 column\."):
        sketch(matrix, 0, "auto")
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        sketch(matrix, 1, "cuda")
    with pytest.raises(ValueError, match="sketch it in parts"):
        sketch(torch.ones(1, 1).expand(1, 2**32), 1, "auto")


def test_gradient() -> None:
    matrix = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    found = sketch(matrix, 3, "auto")
    (gradient,) = torch.autograd.grad(found, matrix, torch.ones_like(found))
    expected = omega((), 6, 3, torch.float32, "reference").sum(dim=1).expand(4, 6)
    assert torch.allclose(gradient.double().cpu(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="has no gradient, but the matrix requires one"):
        sketch(matrix, 3, "triton")
