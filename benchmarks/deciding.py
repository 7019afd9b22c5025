"""Three measurements that can flip a decision of the kernels, each beside its prediction.

    python benchmarks/deciding.py --output FOLDER/deciding.jsonl

skinny     what part of the copy bandwidth the library's thin products reach, and the passes of each
           backend of kernels
extended   the extended product against the library's product, alone and followed by `addmm`
padded     the library's product at an inner width of K + 32 against K: the price of carrying the
           skinny columns in the padding of X and W

Predictions are made from the rates measured at the start of the run and the efficiencies assumed in
EXPECTED, which were written down before any of this was measured.
Shapes: T tokens, I inner and J outer width of a product, R LoRA rank, Q write basis size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels.bench.cost import Rates
from grasp_kernels.bench.machine import environment, measure_rates
from grasp_kernels.bench.timing import CallWork, Measured, time_in_turn
from grasp_kernels.files import whole_file
from grasp_kernels.ops.lora_linear import registry
from grasp_kernels.ops.lora_linear.triton.fused import Passes
from grasp_kernels.ops.lora_linear.triton.gemm import extended_gemm
from grasp_kernels.testing import orthonormal, relative_error

Row = dict[str, Any]
# Parts of the peak product rate and of the copy bandwidth.
EXPECTED = {
    "library product": 1.0,
    "extended product": 0.95,
    "library skinny": 0.60,
    "our pass": 0.85,
    "addmm": 0.80,
}


@dataclass(frozen=True)
class Shapes:
    """What is measured; the defaults are those of Llama-3.1-8B and 70B."""

    T: int = 8192
    products: tuple[tuple[int, int], ...] = (
        (4096, 1024), (4096, 4096), (4096, 14336), (14336, 4096),
        (8192, 8192), (8192, 28672), (28672, 8192),
    )  # fmt: skip
    widths: tuple[int, ...] = (4096, 14336)
    ranks: tuple[int, ...] = (16, 64, 128)
    Q: int = 4
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class _Candidate:
    call: Callable[[], Any]
    seconds: float  # predicted


@dataclass(frozen=True)
class Case:
    """Candidates for the same work: the bytes that it moves at least, and its operations."""

    sizes: Row
    moved: int
    flops: int
    candidates: dict[str, _Candidate]


def rows(shapes: Shapes, device: torch.device, rounds: int) -> Iterator[Row]:
    """One row a candidate; a case whose check fails is one row that says so."""
    machine = environment(device)
    rates = measure_rates(shapes.dtype, device)
    for make, sizes in _plan(shapes):
        try:
            case = make(shapes, *sizes, device, rates)
        except Exception as error:
            failed = {"kind": make.__name__.strip("_"), "I": sizes[0], "candidate": "all"}
            yield {**failed, "failed": str(error), **machine}
            continue
        works = {name: CallWork(candidate.call) for name, candidate in case.candidates.items()}
        for name, found in time_in_turn(works, device, rounds=rounds).items():
            yield {
                **case.sizes,
                "candidate": name,
                "predicted": case.candidates[name].seconds * 1e3,
                **_figures(case, found),
                "rates": rates._asdict(),
                **machine,
            }


def _figures(case: Case, found: Measured | Exception) -> Row:
    if isinstance(found, Exception):
        return {"failed": str(found)}
    times = found.forward
    return {
        "failed": None,
        "milliseconds": times.median,
        "p20": times.p20,
        "p80": times.p80,
        "gigabytes_per_second": case.moved / times.median / 1e6,
        "tflops": case.flops / times.median / 1e9,
    }


def _plan(shapes: Shapes) -> Iterator[tuple[Callable[..., Case], tuple[int, int]]]:
    for width in shapes.widths:
        for R in shapes.ranks:
            yield _skinny, (width, R)
            yield _input, (width, R)
            yield _gradient, (width, R)
    for product in shapes.products:
        yield _extended, product
        yield _padded, product


def _normal(shapes: Shapes, device: torch.device, *size: int) -> Tensor:
    return torch.randn(*size, device=device, dtype=torch.float32).to(shapes.dtype)


def _empty(device: torch.device, *size: int) -> Tensor:
    return torch.empty(*size, device=device, dtype=torch.float32)


def _sizes(kind: str, shapes: Shapes, **sizes: int) -> Row:
    dtype = str(shapes.dtype).removeprefix("torch.")
    return {"kind": kind, "dtype": dtype, "T": shapes.T, **sizes}


def _checked(name: str, found: Tensor, exact: Tensor, limit: float | None = None) -> None:
    """No time of a wrong result."""
    error = relative_error(found, exact)
    if not error <= (torch.finfo(found.dtype).eps if limit is None else limit):
        raise RuntimeError(f"{name} is wrong, its relative error is {error:.1e}; mend it first.")


def _passes(device: torch.device) -> dict[str, Passes]:
    """The passes of every backend of kernels that runs here."""
    reasons = registry.backends(device)
    names = [name for name in registry.KERNELS if reasons[name] is None]
    return {name: import_module(f"{registry.PACKAGE}.{name}.passes") for name in names}  # type: ignore[misc]


def _skinny(shapes: Shapes, K: int, R: int, device: torch.device, rates: Rates) -> Case:
    """`S[R, T] = A Xᵀ`, one read of X."""
    x, A = _normal(shapes, device, shapes.T, K), _normal(shapes, device, R, K)
    read = x.numel() * x.element_size()
    copy = read / (rates.bandwidth_gbs * 1e9)
    calls = {
        "library A Xᵀ": _Candidate(lambda: A @ x.mT, copy / EXPECTED["library skinny"]),
        "library X Aᵀ": _Candidate(lambda: x @ A.mT, copy / EXPECTED["library skinny"]),
    }
    for name, passes in _passes(device).items():
        exact = A.double() @ x[:64].double().mT
        _checked(f"the down pass of {name}", passes.down(x[:64], A), exact)
        call = partial(passes.down, x, A)
        calls[f"down pass, {name}"] = _Candidate(call, copy / EXPECTED["our pass"])
    return Case(_sizes("down", shapes, I=K, R=R), read, 2 * shapes.T * K * R, calls)


def _input(shapes: Shapes, K: int, R: int, device: torch.device, rates: Rates) -> Case:
    """`dA[R, K] = dSᵀ X`, one read of X."""
    T = shapes.T
    x, dS, dA = _normal(shapes, device, T, K), _normal(shapes, device, R, T), _empty(device, R, K)
    read = x.numel() * x.element_size()
    copy = read / (rates.bandwidth_gbs * 1e9)
    calls = {"library": _Candidate(lambda: dS @ x, copy / EXPECTED["library skinny"])}
    for name, passes in _passes(device).items():
        call = partial(passes.sums, x, dS, dA.mT)
        call()
        limit = torch.finfo(torch.float32).eps * T**0.5
        _checked(f"the input pass of {name}", dA, dS.double() @ x.double(), limit)
        calls[f"input pass, {name}"] = _Candidate(call, copy / EXPECTED["our pass"])
    return Case(_sizes("input", shapes, I=K, R=R), read, 2 * T * K * R, calls)


def _gradient(shapes: Shapes, N: int, R: int, device: torch.device, rates: Rates) -> Case:
    """`[dS | D]` and `dB` from one read of dY, or two where the partial sums are wide."""
    T, Q = shapes.T, shapes.Q
    dy, S, B = (_normal(shapes, device, *size) for size in ((T, N), (R, T), (N, R)))
    V = orthonormal(N, Q, torch.Generator().manual_seed(0)).to(device)
    thin, B_t = V.to(shapes.dtype), torch.cat([B, V.to(shapes.dtype)], 1).mT.contiguous()
    dB = _empty(device, N, R)

    def library() -> None:
        B_t @ dy.mT
        found = (S @ dy).mT.float()
        found -= V @ (V.mT @ found)

    def gradient(passes: Passes, together: bool) -> Tensor:
        skinny = None if together else passes.down(dy, B_t, n_scaled=R)
        factor = B if together else None
        found = passes.sums(dy, S, dB, factor=factor, basis=V, project=together)
        skinny = found if together else skinny
        assert skinny is not None
        return skinny

    read = dy.numel() * dy.element_size()
    copy = read / (rates.bandwidth_gbs * 1e9)
    calls = {"library": _Candidate(library, 2 * copy / EXPECTED["library skinny"])}
    exact = torch.cat([B, -thin], 1).double().mT @ dy.double().mT
    for name, passes in _passes(device).items():
        together = passes.one_read(dy, R, Q, R + Q)
        call = partial(gradient, passes, together)
        _checked(f"the gradient pass of {name}", call(), exact)
        seconds = (1 if together else 2) * copy / EXPECTED["our pass"]
        calls[f"gradient pass, {name}"] = _Candidate(call, seconds)
    flops = 2 * T * N * (2 * R + Q)
    return Case(_sizes("gradient", shapes, I=N, R=R, Q=Q), read, flops, calls)


def _extended(shapes: Shapes, I: int, J: int, device: torch.device, rates: Rates) -> Case:
    """`X Wᵀ + S Bᵀ` by the kernel and by the library."""
    T, R = shapes.T, shapes.ranks[0]
    x, W, S, B = (_normal(shapes, device, *s) for s in ((T, I), (J, I), (R, T), (J, R)))
    out, accumulated = x.new_empty(T, J), x.new_empty(T, J)
    extended_gemm(x, W.mT, out, S, B.mT)
    exact = x[:64].double() @ W.double().mT + S[:, :64].double().mT @ B.double().mT
    _checked("the extended product", out[:64], exact)
    flops, moved = 2 * T * I * J, 4 * T * J
    product = flops / (rates.peak_tflops * 1e12)
    addmm = moved / (rates.bandwidth_gbs * 1e9) / EXPECTED["addmm"]
    calls = {
        "library product": _Candidate(lambda: F.linear(x, W), product),
        "library product, addmm": _Candidate(
            lambda: torch.mm(x, W.mT, out=accumulated).addmm_(S.mT, B.mT), product + addmm
        ),
        "extended product": _Candidate(
            lambda: extended_gemm(x, W.mT, out, S, B.mT), product / EXPECTED["extended product"]
        ),
    }
    return Case(_sizes("extended", shapes, I=I, J=J, R=R), moved, flops, calls)


def _padded(shapes: Shapes, I: int, J: int, device: torch.device, rates: Rates) -> Case:
    """The library's product on buffers that are 32 columns wider, apart from filling them."""
    T, pad = shapes.T, 32
    x, W = _normal(shapes, device, T, I), _normal(shapes, device, J, I)
    wide_x, wide_W = F.pad(x, (0, pad)), F.pad(W, (0, pad))
    W_t, wide_t = W.mT.contiguous(), F.pad(W.mT, (0, 0, 0, pad))
    flops = 2 * T * I * J
    product = flops / (rates.peak_tflops * 1e12)
    wider = product * (1 + pad / I)
    calls = {
        "X Wᵀ": _Candidate(lambda: x @ W.mT, product),
        "X Wᵀ padded": _Candidate(lambda: wide_x @ wide_W.mT, wider),
        "X W": _Candidate(lambda: x @ W_t, product),
        "X W padded": _Candidate(lambda: wide_x @ wide_t, wider),
        "copy of X": _Candidate(
            lambda: wide_x[:, :I].copy_(x), 2 * x.numel() * 2 / (rates.bandwidth_gbs * 1e9)
        ),
    }
    return Case(_sizes("padded", shapes, I=I, J=J, pad=pad), 4 * T * I, flops, calls)


def table(found: list[Row]) -> str:
    """Markdown, a line a candidate."""
    lines = [
        "| kind | I | J | R | candidate | ms | p20–p80 | predicted | GB/s | TFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        sizes = " | ".join(str(row.get(name, "")) for name in ("I", "J", "R"))
        if row["failed"] is not None:
            lines.append(f"| {row['kind']} | {sizes} | {row['candidate']} | {row['failed']} |")
            continue
        lines.append(
            f"| {row['kind']} | {sizes} | {row['candidate']} | {row['milliseconds']:.3f} | "
            f"{row['p20']:.3f}–{row['p80']:.3f} | {row['predicted']:.3f} | "
            f"{row['gigabytes_per_second']:.0f} | {row['tflops']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="The three measurements that can flip a decision.")
    parser.add_argument("--output", metavar="FILE.jsonl", help="where to keep the rows")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each, default 20")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("deciding.py: torch sees no GPU; run it on a machine with one.", file=sys.stderr)
        return 2
    with torch.no_grad():
        found = list(rows(Shapes(), torch.device("cuda"), arguments.rounds))
    if arguments.output:
        with whole_file(arguments.output) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
