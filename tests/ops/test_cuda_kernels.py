"""The CUDA kernels by themselves against float64: on a GPU, or on the emulator of several parts.

The emulator settles what CUDA leaves open by a seed: in turn (0), everything late (odd), early or
late at random (even).
"""

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from grasp_kernels.ops.lora_linear.cuda import backend, passes
from grasp_kernels.ops.lora_linear.cuda.library import operators
from grasp_kernels.ops.lora_linear.triton import passes as triton_passes
from grasp_kernels.ops.lora_linear.triton.dropout import drawn
from tests.helpers.backends import operands
from tests.helpers.kernels import DEVICE, assert_exact, keep_mask, normal, seeded
from tests.helpers.oracle import orthonormal, relative_error
from tools import emulator

ON_GPU = torch.cuda.is_available()
DTYPES = (torch.bfloat16, torch.float16)
SEEDS = (0,) if ON_GPU else (0, 1, 2)
SHAPES = [  # T, C, R, Q
    (1, 8, 1, 0),
    (150, 72, 5, 3),
    (64, 264, 16, 0),
    (130, 520, 12, 4),
    (257, 136, 64, 4),
    (70, 144, 100, 60),
    (33, 2304, 20, 1),  # nine slabs, which no cluster but the smallest divides
    (130, 4096, 16, 4),  # two clusters of eight
]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]


@pytest.fixture(params=["a GPU"] if ON_GPU else list(emulator.PARTS))
def part(request: pytest.FixtureRequest) -> Iterator[str]:
    with nullcontext() if ON_GPU else emulator.part(request.param):
        yield request.param


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    order(request.param)
    yield request.param
    order(0)


def order(seed: int) -> None:
    if not ON_GPU:
        emulator.configure(seed)


def basis(C: int, Q: int) -> torch.Tensor | None:
    return orthonormal(C, Q, torch.Generator().manual_seed(0)).to(DEVICE) if Q else None


def major(part: str) -> int:
    return torch.cuda.get_device_capability()[0] if ON_GPU else emulator.PARTS[part][0]


def projected(sums: torch.Tensor, V: torch.Tensor | None) -> torch.Tensor:
    return sums if V is None else sums - V.double() @ (V.double().mT @ sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "C", "R", "Q"), SHAPES)
def test_down_pass(
    T: int, C: int, R: int, Q: int, dtype: torch.dtype, part: str, seed: int
) -> None:
    x, A, n = normal(T, C, dtype=dtype), normal(R, C, dtype=dtype), R // 2
    signs = torch.cat([torch.full((n,), 1.5), torch.full((R - n,), -1.0)]).to(DEVICE).double()
    found = passes.down(x, A, scaling=1.5, n_scaled=n)
    assert_exact(found, signs[:, None] * (A.double() @ x.double().mT), C)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "C", "R", "Q"), SHAPES)
def test_sum_over_tokens(
    T: int, C: int, R: int, Q: int, dtype: torch.dtype, part: str, seed: int
) -> None:
    z, left, V = normal(T, C, dtype=dtype), normal(R, T, dtype=dtype), basis(C, Q)
    out = torch.empty(R, C, device=DEVICE)
    assert passes.sums(z, left, out.mT, basis=V, scaling=2.0) is None
    assert_exact(out.mT, projected(2.0 * z.double().mT @ left.double().mT, V), T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize(("T", "C", "R", "Q"), SHAPES)
def test_gradient_pass(
    T: int, C: int, R: int, Q: int, project: bool, dtype: torch.dtype, part: str, seed: int
) -> None:
    """Everything that one read of dY gives; what costs more than two reads is refused."""
    z, left, V = normal(T, C, dtype=dtype), normal(R, T, dtype=dtype), basis(C, Q)
    factor, E = normal(C, R, dtype=dtype), R + (Q if project else 0)
    out = torch.empty(C, R, device=DEVICE)
    options = {"factor": factor, "basis": V, "project": project, "scaling": 2.0}
    if operators().skinny_parts(major(part), C, R, E) == 0:
        most = 64 if major(part) == 9 else 32
        assert most < E or R > 32
        with pytest.raises(RuntimeError, match=rf"gives {E} skinny rows in the same read; ask "):
            passes.sums(z, left, out, **options)
        return
    skinny = passes.sums(z, left, out, **options)
    assert skinny is not None and skinny.shape == (E, T)
    assert_exact(skinny[:R], 2.0 * factor.double().mT @ z.double().mT, C)
    assert_exact(out, projected(2.0 * z.double().mT @ left.double().mT, V), T)
    if V is not None:
        assert relative_error(V.mT @ out, torch.zeros(Q, R, device=DEVICE)) <= 1e-5 * out.norm()
        if project:
            assert_exact(skinny[R:], -V.to(dtype).double().mT @ z.double().mT, C)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
def test_the_mask_is_that_of_the_triton_kernels(
    dropout_p: float, dtype: torch.dtype, part: str, seed: int
) -> None:
    T, K, R = 75, 200, 6
    x, A, dS = normal(T, K, dtype=dtype), normal(R, K, dtype=dtype), normal(R, T, dtype=dtype)
    dropout, keep = seeded(dropout_p), 1.0 - dropout_p
    kept = keep_mask(x, *dropout).double()
    dropped = x.double() * kept / keep if keep else torch.zeros(T, K, dtype=torch.float64).to(x)
    out = torch.empty(K, R, device=DEVICE)
    assert_exact(passes.down(x, A, dropout=dropout), A.double() @ dropped.double().mT, K)
    passes.sums(x, dS, out, dropout=dropout)
    assert_exact(out, dropped.double().mT @ dS.double().mT, T)


def test_no_order_of_the_threads_changes_a_bit(part: str) -> None:
    T, C, R, Q = 200, 1100 // 8 * 8, 10, 4
    z, left, factor = (normal(*s, dtype=torch.bfloat16) for s in ((T, C), (R, T), (C, R)))
    V, dropout = basis(C, Q), seeded(0.3)
    runs = []
    for seed in range(2 if ON_GPU else 7):
        order(seed)
        out = torch.empty(C, R, device=DEVICE)
        skinny = passes.sums(z, left, out, factor=factor, basis=V, project=True)
        dropped = torch.empty(C, R, device=DEVICE)
        passes.sums(z, left, dropped, dropout=dropout)
        runs.append((skinny, out, dropped, passes.down(z, factor.mT.contiguous(), dropout=dropout)))
    order(0)
    for others in zip(*runs, strict=True):
        assert all(torch.equal(others[0], other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype, part: str) -> None:
    """What the copy engine cannot read is copied first; results go where they are asked to."""
    T, C, R, Q = 45, 96, 5, 2
    x, left, factor = (normal(*s, dtype=dtype) for s in ((T, C), (R, T), (C, R)))
    V, A = basis(C, Q), normal(R, C, dtype=dtype)
    expected = torch.empty(C, R, device=DEVICE)
    options = {"factor": factor, "basis": V, "project": True}
    skinny, S = passes.sums(x, left, expected, **options), passes.down(x, A)

    def shifted(matrix: torch.Tensor) -> torch.Tensor:
        """The same numbers, the first two bytes behind a boundary of 16."""
        memory = torch.empty(matrix.numel() + 1, dtype=dtype, device=DEVICE)
        return memory[1:].view(matrix.shape).copy_(matrix)

    def within(matrix: torch.Tensor, more: int) -> torch.Tensor:
        """The same numbers as a part of a wider matrix."""
        wide = torch.empty(len(matrix), matrix.shape[1] + more, dtype=matrix.dtype, device=DEVICE)
        return wide[:, : matrix.shape[1]].copy_(matrix)

    for z, others in (
        (x.mT.contiguous().mT, {}),
        (shifted(x), {"factor": factor.mT.contiguous().mT}),
        (within(x, 8), {"factor": within(factor, 3), "basis": within(V, 1)}),
        (within(x, 3), {"basis": V.mT.contiguous().mT}),
    ):
        out = torch.empty(R, C, device=DEVICE).mT
        assert torch.equal(passes.sums(z, shifted(left), out, **options | others), skinny)
        assert torch.equal(out, expected)
        assert torch.equal(passes.down(z, within(A, 16)), S)
        assert torch.equal(passes.down(z, shifted(A)), S)
    same = x[:1].expand(T, C)
    assert torch.equal(passes.down(same, A), passes.down(same.contiguous(), A))
    for kind in (torch.float32, *DTYPES):
        out = torch.empty(C, R, device=DEVICE, dtype=kind)
        passes.sums(x, left, out, basis=V)
        assert torch.equal(out, expected.to(kind))


def test_no_tokens(part: str) -> None:
    z, left, factor = (normal(*s, dtype=torch.bfloat16) for s in ((0, 16), (3, 0), (16, 3)))
    out = torch.empty(16, 3, device=DEVICE)
    skinny = passes.sums(z, left, out, factor=factor)
    assert skinny is not None and skinny.shape == (3, 0)
    assert not out.any()
    assert passes.down(z, factor.mT.contiguous()).shape == (3, 0)


def test_one_read_where_it_moves_fewer_bytes() -> None:
    """Parts of the skinny result are float32; one a slab of 512 columns on Hopper."""

    def one_read(major: int, C: int, R: int, E: int) -> bool:
        return passes._one_read(major, C, R, E)

    assert one_read(9, 4096, 16, 20) and one_read(9, 14336, 32, 64)
    assert one_read(9, 8, 1, 1) and not one_read(9, 4096, 64, 68)
    assert one_read(8, 4096, 16, 20) and one_read(12, 28672, 16, 16)
    assert not one_read(8, 4096, 64, 68)
    parts = operators().skinny_parts
    assert (parts(9, 2048, 16, 20), parts(9, 4096, 16, 20), parts(9, 14336, 16, 20)) == (4, 8, 28)
    assert (parts(8, 2048, 16, 20), parts(9, 2304, 16, 20), parts(9, 64, 100, 161)) == (16, 5, 0)


@pytest.mark.parametrize("name", ["down", "sums", "one_read"])
def test_all_backends_of_kernels_have_the_same_passes(name: str) -> None:
    def parameters(function: object) -> list[inspect.Parameter]:
        return [*inspect.signature(function, eval_str=True).parameters.values()]  # type: ignore[arg-type]

    ours, triton = (parameters(getattr(of, name)) for of in (passes, triton_passes))
    assert ours == triton[: len(ours)]  # Triton's may have more, which have defaults


def test_the_registered_schemas() -> None:
    found = {name: str(getattr(operators(), name).default._schema) for name in ("sums", "down")}
    assert found == {
        "sums": (
            "grasp_kernels_cuda::sums(Tensor z, Tensor left, Tensor(a!) out, Tensor? factor, "
            "Tensor? basis, bool project, float scaling, Tensor? seed, int threshold) "
            "-> Tensor"
        ),
        "down": (
            "grasp_kernels_cuda::down(Tensor z, Tensor factor, float scaling, int n_scaled, "
            "Tensor? seed, int threshold) -> Tensor"
        ),
    }


def call(**changes: object) -> torch.Tensor:
    bf16 = torch.bfloat16
    given = {
        "z": normal(9, 16, dtype=bf16),
        "left": normal(3, 9, dtype=bf16),
        "out": torch.empty(16, 3, device=DEVICE),
        "factor": normal(16, 3, dtype=bf16),
        "basis": basis(16, 2),
        "project": True,
        "scaling": 1.0,
        "seed": None,
        "threshold": 0,
    }
    return operators().sums(*(given | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(9, 16)}, "z must be bfloat16 or float16; use another backend"),
        ({"z": torch.zeros(9, 12, dtype=torch.bfloat16)}, "z has 12 columns, which is no multiple"),
        ({"z": torch.zeros(9, 0, dtype=torch.bfloat16)}, "z has 0 columns"),
        ({"z": torch.zeros(9, dtype=torch.bfloat16)}, "z has 1 dimensions; the kernels take matr"),
        ({"left": torch.zeros(3, 8, dtype=torch.bfloat16)}, r"left has shape \[3, 8\], expected "),
        ({"left": torch.zeros(3, 9, dtype=torch.half)}, "left has another dtype than z; cast one"),
        ({"left": torch.zeros(0, 9, dtype=torch.bfloat16)}, "the rank is 0; a LoRA layer needs"),
        (
            {"left": torch.zeros(159, 9, dtype=torch.bfloat16)},
            r"R \+ Q is 161 but the kernels ",
        ),
        ({"out": torch.zeros(3, 16)}, r"out has shape \[3, 16\], expected \[16, 3\]\."),
        ({"out": torch.zeros(16, 3, dtype=torch.double)}, "out must be float32, bfloat16 or float"),
        ({"factor": torch.zeros(3, 16, dtype=torch.bfloat16)}, r"factor has shape \[3, 16\]"),
        ({"factor": torch.zeros(16, 3)}, "factor has another dtype than z"),
        ({"basis": torch.zeros(8, 2)}, r"basis has shape \[8, 2\], expected \[16, 2\]"),
        ({"basis": torch.zeros(16, 2, dtype=torch.half)}, "basis must be float32"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be one int64"),
        ({"seed": torch.zeros(1)}, "seed must be one int64"),
        ({"threshold": 70000}, "the dropout threshold is 70000; it counts in units of"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, torch.Tensor], message: str) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    with pytest.raises(RuntimeError, match=message) as raised:
        call(**moved)
    sentence = str(raised.value)
    assert re.fullmatch(r"[^\n]+\.", sentence) and ".cpp" not in sentence


@pytest.mark.skipif(not ON_GPU, reason="needs a second kind of device")
@pytest.mark.parametrize("name", ["left", "out", "factor", "basis", "seed"])
def test_everything_is_on_one_device(name: str) -> None:
    elsewhere = {
        "left": torch.zeros(3, 9, dtype=torch.bfloat16),
        "out": torch.zeros(16, 3),
        "factor": torch.zeros(16, 3, dtype=torch.bfloat16),
        "basis": torch.zeros(16, 2),
        "seed": torch.zeros(1, dtype=torch.int64),
    }
    with pytest.raises(RuntimeError, match=f"{name} is on another device than z; move one"):
        call(**{name: elsewhere[name]})


def test_what_a_layer_may_be() -> None:

    x = torch.empty(3, 24, dtype=torch.bfloat16)
    assert backend.refuses(x, operands(K=24, N=16, R=4)) is None
    assert "x has torch.float32" in str(backend.refuses(x.float(), operands(K=24, N=16, R=4)))
    assert "multiples of 8 but the layer has (12, 24)" in str(
        backend.refuses(x, operands(K=24, N=12, R=4))
    )
    assert "with a sum up to 160 but this layer has 161" in str(
        backend.refuses(x, operands(K=24, N=16, R=150, Q=11))
    )
    assert math.isclose(drawn(seeded(0.25))[2], 1 / 0.75)
