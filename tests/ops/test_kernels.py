"""Each Triton kernel by itself against float64, on every launch path that it has."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from grasp_kernels.ops.gpu.launch import PARTS, dry_run
from grasp_kernels.ops.lora_linear.triton import gemm
from grasp_kernels.ops.lora_linear.triton.down import down
from grasp_kernels.ops.lora_linear.triton.gemm import Tile, extended_gemm, product
from grasp_kernels.ops.lora_linear.triton.reduce import finish_factor, finish_skinny, total
from grasp_kernels.ops.lora_linear.triton.tokens import Slab, one_read, token_pass
from tests.helpers.kernels import DEVICE, assert_exact, keep_mask, normal, seeded
from tests.helpers.oracle import orthonormal, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("T", "I", "J", "R", "Q"),
    [(33, 48, 40, 4, 4), (140, 104, 136, 40, 0), (65, 33, 67, 3, 1)],
)
def test_extended_product(
    dtype: torch.dtype, tma: bool, transposed: bool, T: int, I: int, J: int, R: int, Q: int
) -> None:
    a, left, right = normal(T, I, dtype=dtype), normal(R, T, dtype=dtype), normal(R, J, dtype=dtype)
    b = normal(J, I, dtype=dtype).mT if transposed else normal(I, J, dtype=dtype)
    bias = normal(J, dtype=dtype)
    d, cw = normal(Q, T, dtype=dtype), normal(Q, J, dtype=dtype)
    out = torch.empty(T, J, dtype=dtype, device=DEVICE)
    projection = (d, cw) if Q else None
    tile = Tile(32, 64, 32, 4, 2)  # several tiles a program
    extended_gemm(
        a, b, out, left, right, bias=bias, scaling=0.7, projection=projection, tile=tile, tma=tma
    )
    exact = a.double() @ b.double() + bias.double() + 0.7 * left.double().mT @ right.double()
    assert_exact(out, exact + d.double().mT @ cw.double(), I + R + Q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("Q", [0, 2])
@pytest.mark.parametrize("path", ["extended", "addmm"])
def test_both_paths_of_a_product_agree(
    dtype: torch.dtype, dropout_p: float, Q: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "choose", lambda *_, **__: path)
    T, I, J, R = 37, 48, 56, 5
    a, b = normal(T, I, dtype=dtype), normal(I, J, dtype=dtype)
    left, right = normal(R, T, dtype=dtype), normal(R, J, dtype=dtype)
    d, cw = normal(Q, T, dtype=dtype), normal(Q, J, dtype=dtype)
    dropout = seeded(dropout_p) if dropout_p else None
    found = product(a, b, left, right, projection=(d, cw) if Q else None, dropout=dropout)
    adapter = left.double().mT @ right.double()
    if dropout is not None:
        adapter = adapter * keep_mask(found, *dropout) / (1 - dropout_p)
    base = a.double() @ b.double()
    exact = base + adapter + d.double().mT @ cw.double()
    # The library rounds the base product before the rest is added.
    rounded_first = relative_error(base.to(dtype), base) * float(base.norm() / exact.norm())
    limit = torch.finfo(dtype).eps + rounded_first
    assert relative_error(found, exact) <= limit + 1e-6


def test_the_choice_of_a_path() -> None:
    """By what was measured on a Hopper, elsewhere predicted by the inner width."""
    choose, sm_90, sm_120, sm_80 = (
        gemm.choose,
        *map(PARTS.get, ("sm_90", "sm_120", "sm_80")),
    )
    assert choose(sm_90, 2, 28672) == "extended"
    assert choose(sm_120, 2, 4096) == "extended"
    assert choose(sm_120, 2, 8192) == "addmm"
    assert choose(sm_80, 2, 4096) == "addmm"
    assert choose(sm_90, 4, 4096) == "addmm"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize(
    ("T", "K", "R"), [(1, 48, 1), (70, 2056, 16), (300, 136, 130), (33, 35, 12)]
)
def test_down_pass(dtype: torch.dtype, tma: bool, T: int, K: int, R: int) -> None:
    """2056 columns of few tokens are shared by several programs, 130 ranks by two."""
    x, A = normal(T, K, dtype=dtype), normal(R, K, dtype=dtype)
    assert_exact(down(x, A, tma=tma), A.double() @ x.double().mT, K)
    n = R // 2
    signs = torch.cat([torch.full((n,), 1.5), torch.full((R - n,), -1.0)]).to(DEVICE)
    exact = signs.double()[:, None] * (A.double() @ x.double().mT)
    assert_exact(down(x, A, scaling=1.5, n_scaled=n, tma=tma), exact, K)


def test_adapters_that_read_the_same_input_share_one_read() -> None:
    x = normal(40, 64, dtype=torch.bfloat16)
    group = [normal(R, 64, dtype=torch.bfloat16) for R in (16, 16, 8)]
    together = down(x, torch.cat(group)).split([16, 16, 8])
    for alone, shared in zip(group, together, strict=True):
        assert torch.equal(down(x, alone), shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("T", "C", "R", "Q"), [(150, 72, 5, 3), (64, 40, 16, 0), (33, 35, 20, 1)])
def test_token_pass(
    dtype: torch.dtype, tma: bool, wide: bool, T: int, C: int, R: int, Q: int
) -> None:
    """Everything that one read gives: the skinny products, the sum over tokens, its projection."""
    z, left, factor = (
        normal(T, C, dtype=dtype),
        normal(R, T, dtype=dtype),
        normal(C, R, dtype=dtype),
    )
    V = None
    if Q:
        V = orthonormal(C, Q, torch.Generator().manual_seed(0)).to(DEVICE)
    slab = Slab(16, 32, 16, 4, 2, wide)  # several slabs, ranges of tokens and blocks of ranks
    parts = token_pass(z, left, factor=factor, basis=V, project=True, slab=slab, tma=tma)
    assert parts.skinny is not None
    assert parts.sums.shape[0] > 1 or T <= 33
    dS, D = finish_skinny(parts.skinny, R, 0.5, dtype).split([R, Q])
    assert_exact(dS, 0.5 * factor.double().mT @ z.double().mT, C)
    out = torch.empty(C, R, device=DEVICE)
    share = None if V is None else total(parts.shares)
    finish_factor(parts.sums, share, V, 2.0, out)
    exact = 2.0 * z.double().mT @ left.double().mT
    if V is not None:
        assert_exact(D, -V.to(dtype).double().mT @ z.double().mT, C)
        assert relative_error(V.mT @ out, torch.zeros(Q, R, device=DEVICE)) <= 1e-5 * exact.norm()
        exact = exact - V.double() @ (V.double().mT @ exact)
    assert_exact(out, exact, T)
    transposed = torch.empty(R, C, device=DEVICE)
    finish_factor(parts.sums, share, V, 2.0, transposed.mT)
    assert torch.equal(transposed.mT, out)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
def test_all_passes_draw_the_same_mask(dropout_p: float) -> None:
    T, K, R = 45, 77, 6
    x, A, dS = normal(T, K), normal(R, K), normal(R, T)
    dropout = seeded(dropout_p)
    mask = keep_mask(x, *dropout).double()
    keep = 1.0 - dropout_p
    dropped = x.double() * mask / keep if keep else torch.zeros_like(x, dtype=torch.float64)
    assert_exact(down(x, A, dropout=dropout), A.double() @ dropped.mT, K)
    parts = token_pass(x, dS, dropout=dropout)
    dA = torch.empty(R, K, device=DEVICE)
    finish_factor(parts.sums, None, None, dropout.inverse_keep, dA.mT)
    assert_exact(dA, dS.double() @ dropped, T)


def test_the_mask_is_random_everywhere() -> None:
    x = torch.empty(400, 203, device=DEVICE)
    seeds = [seeded(0.25) for _ in range(3)]
    masks = [keep_mask(x, *dropout).double() for dropout in seeds]
    six_sigma = 6 * math.sqrt(0.25 * 0.75)
    for mask in masks:
        assert abs(mask.mean() - 0.75) <= six_sigma / math.sqrt(mask.numel())
        assert (mask.mean(0) - 0.75).abs().max() <= six_sigma / math.sqrt(400)
        assert (mask.mean(1) - 0.75).abs().max() <= six_sigma / math.sqrt(203)
    for first, second in pairwise(masks):
        agreement = (first == second).double().mean()
        expected = 0.75**2 + 0.25**2
        assert abs(agreement - expected) <= six_sigma / math.sqrt(x.numel())
        neighbours = (first[:, 1:] == first[:, :-1]).double().mean()
        assert abs(neighbours - expected) <= six_sigma / math.sqrt(x.numel())
    assert torch.equal(masks[0], keep_mask(x, *seeds[0]).double())
    assert keep_mask(x, *seeded(0.0)).all()
    assert not keep_mask(x, *seeded(1.0)).any()


@pytest.mark.parametrize("tma", [True, False])
def test_offsets_beyond_two_to_the_31(tma: bool) -> None:
    """Rows 2²⁶ elements apart; only the pages that hold them are ever touched."""
    T, K, R = 40, 16, 3
    torch.use_deterministic_algorithms(False)  # which would fill all of it
    far = torch.empty((T - 1) * 2**26 + K, dtype=torch.float16, device=DEVICE)
    x = far.as_strided((T, K), (2**26, 1))
    x.copy_(normal(T, K))
    near, A, dS = x.contiguous(), normal(R, K, dtype=x.dtype), normal(R, T, dtype=x.dtype)
    assert torch.equal(down(x, A, tma=tma), down(near, A, tma=tma))
    for found, expected in zip(
        token_pass(x, dS, factor=A.mT, tma=tma), token_pass(near, dS, factor=A.mT, tma=tma),
        strict=True,
    ):  # fmt: skip
        assert found is expected is None or torch.equal(found, expected)
    W, B = normal(8, K, dtype=x.dtype), normal(8, R, dtype=x.dtype)
    outs = [torch.empty(T, 8, dtype=x.dtype, device=DEVICE) for _ in range(2)]
    for a, out in zip((x, near), outs, strict=True):
        extended_gemm(a, W.mT, out, dS, B.mT, tma=tma)
    assert torch.equal(*outs)


def test_one_read_of_the_gradient_where_it_is_cheaper() -> None:
    """Parts of [dS | D] are 8 E bytes a slab and token, a second read 2 c."""
    z = torch.empty(512, 4096, dtype=torch.bfloat16, device="meta")
    with dry_run(PARTS["sm_90"]):  # slabs of 256 columns up to R = 32, of 128 above
        assert one_read(z, 16, 64) and not one_read(z, 16, 65)
        assert one_read(z, 33, 32) and not one_read(z, 33, 33)


def launched(part: str, **sizes: Any) -> list[str]:
    """The kernels that one backward makes on a part."""
    from grasp_kernels.ops.lora_linear.operands import Needs, Operands, Saved
    from grasp_kernels.ops.lora_linear.triton.backend import backward

    T, K, N, R, Q = (
        sizes.get(k, d) for k, d in zip("TKNRQ", (512, 4096, 4096, 16, 4), strict=True)
    )

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    V = empty(N, Q, dtype=torch.float32)
    A, B = empty(R, K), empty(N, R)
    op = Operands(empty(N, K), None, A, B, None, V, None, 1.0, 0.0, True, True)
    with dry_run(PARTS[part]) as run:
        needs = Needs(True, False, False, True, True, False)
        backward(empty(T, N), empty(T, K), Saved(empty(R, T), A, B), op, needs)
    return [launch.kernel.fn.__name__.strip("_").removesuffix("_kernel") for launch in run.launches]


def test_the_launches_of_a_backward() -> None:
    """The projection adds one, of its shares; wide ranks read dY twice; before Hopper wide products
    are the library's."""
    finish = ["finish_skinny", "total", "finish_factor"]
    single = ["token_pass", *finish, "extended_gemm", "token_pass", "finish_factor"]
    assert launched("sm_90") == single
    assert launched("sm_90", R=128, T=8192)[:2] == ["down", "token_pass"]
    assert "extended_gemm" in launched("sm_90", N=14336)
    assert "extended_gemm" not in launched("sm_120", N=14336)
    assert "extended_gemm" not in launched("sm_80")
