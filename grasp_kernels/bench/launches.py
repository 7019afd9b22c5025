"""The launches of a linear layer, each by itself: which there are, and how to make one.

What there is, is what the operator launches: it runs on meta tensors while the keys that it asks
for are written down.
Shapes: T tokens, K in, N out, R LoRA rank, Q basis size; C, E, I, J as in the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from grasp_kernels.bench.candidates import Choice, table_choice
from grasp_kernels.bench.shapes import Linear
from grasp_kernels.ops.gpu.launch import Part, dry_run
from grasp_kernels.ops.gpu.tuning import DownKey, GemmKey, Key, TokensKey, consulted
from grasp_kernels.ops.lora_linear.operands import Needs, Operands
from grasp_kernels.ops.lora_linear.triton import backward, forward
from grasp_kernels.ops.lora_linear.triton.down import down
from grasp_kernels.ops.lora_linear.triton.dropout import Dropout
from grasp_kernels.ops.lora_linear.triton.gemm import extended_gemm
from grasp_kernels.ops.lora_linear.triton.reduce import finish_factor, finish_skinny, total
from grasp_kernels.ops.lora_linear.triton.tokens import Slab, one_read, token_pass

Results = tuple[Tensor, ...]
Work = Callable[[Choice], Results]
_DROPPED = 0.1  # the probability matters to no choice


def keys_of(
    linears: Iterable[Linear], T: int, R: int, Q: int, dtype: torch.dtype, dropout: bool, part: Part
) -> list[Key]:
    """The keys that forward and backward of the layers ask for, each once.

    A gradient pass that reads `dY` twice asks for its one-read form first and is left out.
    """
    asked: list[Key] = []
    for linear in dict.fromkeys(linear._replace(name="") for linear in linears):
        with dry_run(part), consulted() as keys:
            call_layer(linear, T, R, Q, dtype, dropout)
        asked += keys
    return [key for key in dict.fromkeys(asked) if _is_launched(key, part)]


def _is_launched(key: Key, part: Part) -> bool:
    if not isinstance(key, TokensKey) or key.E == 0:
        return True
    return one_read(cast(Slab, table_choice(key, part)), key.E)


def call_layer(linear: Linear, T: int, R: int, Q: int, dtype: torch.dtype, dropout: bool) -> None:
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
        padded_weight=None,
        dropout_seed=empty(1, dtype=torch.int64) if dropout else None,
        scaling=2.0,
        dropout_p=_DROPPED if dropout else 0.0,
        residual=True,
        closed=True,
    )
    x = empty(T, K)
    y, saved = forward(x, op)
    needs = Needs(x=True, weight=False, bias=False, lora_A=True, lora_B=True, lora_bias=False)
    backward(torch.empty_like(y), x, saved, op, needs)


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
    return make[key.kernel](key, T, normal, Dropout(seed, _DROPPED) if key.dropout else None)


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
        share = None if partial.shares is None else total(partial.shares)
        finish_factor(partial.sums, share, basis, 1.0, sums)
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
