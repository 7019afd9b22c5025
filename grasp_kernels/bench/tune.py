"""Tune the launches of a model's linear layers: time neighbours of the table's choices.

What is tuned is what the operator launches: it runs on meta tensors while the keys that it asks for
are written down. A choice wins only if it computes the same and is faster by more than the
measurements spread.
Shapes: T tokens, K in, N out, R LoRA rank, Q basis size; C, E, I, J as in the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from grasp_kernels.bench.candidates import Choice, candidates, table_choice
from grasp_kernels.bench.shapes import Linear
from grasp_kernels.bench.timing import Measured, Times, time_in_turn
from grasp_kernels.ops.gpu.launch import Part, dry_run, part_of
from grasp_kernels.ops.gpu.tuning import DownKey, GemmKey, Key, TokensKey, consulted
from grasp_kernels.ops.lora_linear.operands import Needs, Operands
from grasp_kernels.ops.lora_linear.triton import backward, forward
from grasp_kernels.ops.lora_linear.triton.down import down
from grasp_kernels.ops.lora_linear.triton.dropout import Dropout
from grasp_kernels.ops.lora_linear.triton.gemm import extended_gemm
from grasp_kernels.ops.lora_linear.triton.reduce import finish_factor, finish_skinny
from grasp_kernels.ops.lora_linear.triton.tokens import Slab, one_read, token_pass

Results = tuple[Tensor, ...]
Work = Callable[[Choice], Results]
Timer = Callable[[Work, list[Choice]], Mapping[Choice, Times | Exception]]

# Of the rms of a result: one term that is missing among 2¹⁴ moves an element by 2⁻⁷ of it, the
# order of a float32 sum by about 2⁻¹⁶.
_ORDER = 2.0**-10


class Outcome(NamedTuple):
    """What became of one launch; `dropped` says why a candidate was not timed."""

    key: Key
    table: Choice
    chosen: Choice
    before: float  # milliseconds, median
    after: float
    dropped: dict[Choice, str]

    @property
    def fields(self) -> dict[str, int]:
        """The choice as a file of tuned launches holds it."""
        return asdict(self.chosen)


def keys_of(
    linears: Iterable[Linear], T: int, R: int, Q: int, dtype: torch.dtype, p: float, part: Part
) -> list[Key]:
    """The keys that forward and backward of the layers ask for, each once.

    A gradient pass that reads `dY` twice asks for its one-read form first and is left out.
    """
    asked: list[Key] = []
    for linear in dict.fromkeys(linear._replace(name="") for linear in linears):
        with dry_run(part), consulted() as keys:
            _call(linear, T, R, Q, dtype, p)
        asked += keys
    return [key for key in dict.fromkeys(asked) if _is_launched(key, part)]


def _is_launched(key: Key, part: Part) -> bool:
    if not isinstance(key, TokensKey) or key.E == 0:
        return True
    return one_read(cast(Slab, table_choice(key, part)), key.E)


def _call(linear: Linear, T: int, R: int, Q: int, dtype: torch.dtype, p: float) -> None:
    """The operator on meta tensors, with the basis of a writer or of a reader."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    K, N = linear.K, linear.N
    writes, reads = (Q > 0 and linear.writes), (Q > 0 and not linear.writes)
    op = Operands(
        weight=empty(N, K),
        bias=None,
        lora_A=empty(R, K, dtype=torch.float32),
        lora_B=empty(N, R, dtype=torch.float32),
        lora_bias=None,
        write_basis=empty(N, Q, dtype=torch.float32) if writes else None,
        read_basis=empty(K, Q, dtype=torch.float32) if reads else None,
        write_weight=empty(Q, K) if writes else None,
        closed_A=empty(R, K),
        closed_B=empty(N, R),
        dropout_seed=empty(1, dtype=torch.int64) if p else None,
        scaling=2.0,
        dropout_p=p,
        residual=True,
        closed=True,
    )
    x = empty(T, K)
    y, saved = forward(x, op)
    needs = Needs(x=True, weight=False, bias=False, lora_A=True, lora_B=True, lora_bias=False)
    backward(torch.empty_like(y), x, saved, op, needs)


def tune(key: Key, T: int, dtype: torch.dtype, device: torch.device, timer: Timer) -> Outcome:
    """The fastest right choice for one launch at `T` tokens."""
    table, *others = candidates(key, part_of(device))
    work = work_of(key, T, dtype, device)
    with _poisoned():
        expected = work(table)
        wrong = {choice: _refusal(work, choice, expected) for choice in others}
    dropped = {choice: reason for choice, reason in wrong.items() if reason is not None}
    right = [table, *(choice for choice in others if choice not in dropped)]
    timed = timer(work, right)
    times = {choice: found for choice, found in timed.items() if isinstance(found, Times)}
    failed = {choice: _reason(found) for choice, found in timed.items() if choice not in times}
    if table in failed:
        raise RuntimeError(f"the launch of {key} cannot be timed: {failed[table]}.")
    best = fastest(times, table)
    return Outcome(key, table, best, times[table].median, times[best].median, {**dropped, **failed})


def fastest(times: Mapping[Choice, Times], table: Choice) -> Choice:
    """The fastest choice, or the table's if the gain is within the spread of either."""
    best = min(times, key=lambda choice: times[choice].median)
    gain = times[table].median - times[best].median
    spread = max(times[choice].p80 - times[choice].p20 for choice in (table, best))
    return best if gain > spread else table


def _refusal(work: Work, choice: Choice, expected: Results) -> str | None:
    """Why a choice must not be used: it does not run, or its results are others."""
    try:
        found = work(choice)
        same = all(_same(f, e) for f, e in zip(found, expected, strict=True))
    except Exception as error:
        return _reason(error)
    return None if same else "its results differ from the table's"


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether results differ by the order of float32 sums and one rounding at most; NaN differs."""
    exact = expected.float()
    limit = torch.finfo(expected.dtype).eps * exact.abs() + _ORDER * exact.square().mean().sqrt()
    return bool(((found.float() - exact).abs() <= limit).all())


def _reason(error: object) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _poisoned() -> Iterator[None]:
    """What is allocated inside is NaN, so that what a launch leaves out cannot pass for right."""
    before = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=lenient)


def work_of(key: Key, T: int, dtype: torch.dtype, device: torch.device) -> Work:
    """The launch of a key, with the reduction that belongs to it, as a function of the choice.

    All terms of a result are of about the same size, so that none can be missing unseen.
    """
    make: dict[str, Callable[..., Work]] = {
        "down": _down_work,
        "tokens": _tokens_work,
        "gemm": _gemm_work,
    }

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) / math.sqrt(fan_in)

    seed = torch.zeros(1, dtype=torch.int64, device=device)
    return make[key.kernel](key, T, normal, Dropout(seed, 0.1) if key.dropout else None)


def _down_work(
    key: DownKey, T: int, normal: Callable[..., Tensor], dropout: Dropout | None
) -> Work:
    x, A = normal(T, key.K), normal(key.R, key.K, fan_in=key.K)

    def work(tile: Any) -> Results:
        return (down(x, A, dropout=dropout, tile=tile, tma=key.tma),)

    return work


def _tokens_work(
    key: TokensKey, T: int, normal: Callable[..., Tensor], dropout: Dropout | None
) -> Work:
    C, R, Q = key.C, key.R, key.Q
    z, left = normal(T, C), normal(R, T, fan_in=T)
    factor = normal(C, R, fan_in=C) if key.E else None
    basis = normal(C, Q, fan_in=C).float() if Q else None

    def work(slab: Any) -> Results:
        partial = token_pass(
            z,
            left,
            factor=factor,
            basis=basis,
            project=key.E > R,
            dropout=dropout,
            slab=slab,
            tma=key.tma,
        )
        sums = z.new_empty(C, R, dtype=torch.float32)
        assert partial.sums is not None
        finish_factor(partial.sums, partial.shares, basis, 1.0, sums)
        if partial.skinny is None:
            return (sums,)
        return sums, finish_skinny(partial.skinny, R, 1.0, z.dtype)

    return work


def _gemm_work(
    key: GemmKey, T: int, normal: Callable[..., Tensor], dropout: Dropout | None
) -> Work:
    I, J, R, Q = key.I, key.J, key.R, key.Q
    a, start = normal(T, I), normal(T, J)
    b = normal(J, I, fan_in=I).mT if key.transposed else normal(I, J, fan_in=I)
    left, right = normal(R, T, fan_in=R), normal(R, J)
    projection = (normal(Q, T, fan_in=Q), normal(Q, J)) if Q else None

    def work(tile: Any) -> Results:
        # The copy of what is added to takes its time from all choices alike.
        out = start.clone() if key.accumulate else torch.empty_like(start)
        extended_gemm(
            a,
            b,
            out,
            left,
            right,
            projection=projection,
            dropout=dropout,
            accumulate=key.accumulate,
            tile=tile,
            tma=key.tma,
        )
        return (out,)

    return work


def gpu_timer(device: torch.device, rounds: int) -> Timer:
    """Times on a GPU, in turn and on a cold L2.

    Graphs are replayed, so that no time of the host is in them: several launches of a few
    microseconds would wait for it.
    """

    def timer(work: Work, choices: list[Choice]) -> Mapping[Choice, Times | Exception]:
        replays: dict[str, _Replay] = {}
        raised: dict[Choice, Times | Exception] = {}
        for choice in choices:
            try:
                replays[str(choice)] = _Replay(work, choice)
            except Exception as error:
                raised[choice] = error.with_traceback(None)
        found = time_in_turn(replays, device, rounds=rounds)
        timed = {
            choice: _forward_times(found[str(choice)]) for choice in choices if choice not in raised
        }
        return {**raised, **timed}

    return timer


def _forward_times(found: Measured | Exception) -> Times | Exception:
    return found.forward if isinstance(found, Measured) else found


class _Replay:
    """A captured launch, timed as a forward."""

    def __init__(self, work: Work, choice: Choice) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = work(choice)[0]

    def reset(self) -> None:
        """There is nothing to forget."""

    def forward(self) -> Tensor:
        self.graph.replay()
        return self.result

    def backward(self, y: Tensor) -> None:
        """There is none."""


def gains(outcomes: Iterable[Outcome]) -> str:
    """A table of what was gained, then what was dropped and why."""
    listed = list(outcomes)
    lines = [
        "| launch | table's choice | ms | tuned choice | ms | gain |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in listed:
        kept = outcome.chosen == outcome.table
        tuned = "the same" if kept else _told(outcome.fields)
        gain = "" if kept else f"{100 * (1 - outcome.after / outcome.before):.1f} %"
        lines.append(
            f"| {_launch(outcome.key)} | {_told(asdict(outcome.table))} | {outcome.before:.4f} | "
            f"{tuned} | {outcome.after:.4f} | {gain} |"
        )
    dropped = [
        f"dropped: {_launch(outcome.key)}, {_told(asdict(choice))}: {reason}"
        for outcome in listed
        for choice, reason in outcome.dropped.items()
    ]
    return "\n".join([*lines, *([""] if dropped else []), *dropped])


def _launch(key: Key) -> str:
    named = {k: v for k, v in key._asdict().items() if k not in ("gpu", "kernel", "itemsize")}
    return f"{key.kernel} {_told(named)}"


def _told(fields: Mapping[str, int]) -> str:
    """Sizes by name, then the flags that are set."""
    sizes = [f"{name}={value}" for name, value in fields.items() if type(value) is not bool]
    return " ".join([*sizes, *(name for name, value in fields.items() if value is True)])
