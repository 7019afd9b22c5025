"""The orders in which published fused LoRA layers issue their library calls, written anew.

    "addmm-twice"  Y = X Wᵀ, += S Bᵀ;  dY B and X Aᵀ computed again wherever they are needed
    "addmm"        the same, `dY B` once; `X Aᵀ` again in the backward
    "saved"        S saved; every adapter product accumulates into, or starts, the frozen product

They show what an order costs on the same library, without projection, bias, dropout or quantised
weights. None is a product, and none stands for one: peers that are installed are providers of
their own.
Shapes: T tokens, K in, N out, R LoRA rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.bench.provider import Provider, Weights


class _AddmmTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, W, A, B, s = inputs
        ctx.save_for_backward(x, W, A, B)
        ctx.scaling = s
        return (x @ W.T).addmm_(x @ A.T, B.T, alpha=s)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, W, A, B), s = outputs, ctx.saved_tensors, ctx.scaling
        dA = s * ((dy @ B).T @ x)
        dB = s * (dy.T @ (x @ A.T))
        dx = (dy @ W).addmm_(dy @ B, A, alpha=s)
        return dx, None, dA, dB, None


class _Addmm(_AddmmTwice):
    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, W, A, B), s = outputs, ctx.saved_tensors, ctx.scaling
        dS = dy @ B
        dA = s * (dS.T @ x)
        dB = s * (dy.T @ (x @ A.T))
        dx = (dy @ W).addmm_(dS, A, alpha=s)
        return dx, None, dA, dB, None


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, W, A, B, s = inputs
        y = x @ W.T
        S = x @ A.T
        ctx.save_for_backward(x, S, W, A, B)
        ctx.scaling = s
        return y.addmm_(S, B.T, alpha=s)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, S, W, A, B), s = outputs, ctx.saved_tensors, ctx.scaling
        dS = s * (dy @ B)
        dB = s * (dy.T @ S)
        dx = dS @ A
        dA = dS.T @ x
        return dx.addmm_(dy, W), None, dA, dB, None


class OrderedLayer(nn.Module):
    """A LoRA layer on one of the functions above."""

    def __init__(self, function: type[torch.autograd.Function], weights: Weights) -> None:
        super().__init__()
        self.function, self.scaling = function, weights.scaling
        self.weight = nn.Parameter(weights.weight, requires_grad=False)
        self.lora_A = nn.Parameter(weights.lora_A.clone())
        self.lora_B = nn.Parameter(weights.lora_B.clone())

    def forward(self, x: Tensor) -> Tensor:
        """`Y[T, N]` from `X[T, K]`."""
        return self.function.apply(x, self.weight, self.lora_A, self.lora_B, self.scaling)


def _ordering(what: str, function: type[torch.autograd.Function]) -> Provider:
    return Provider(what, lambda weights: OrderedLayer(function, weights))


ORDERINGS: dict[str, Provider] = {
    "ordering-addmm-twice": _ordering(
        "order as in unsloth: dY B twice, X Aᵀ again, accumulating products", _AddmmTwice
    ),
    "ordering-addmm": _ordering(
        "order as in axolotl: dY B once, X Aᵀ again, accumulating products", _Addmm
    ),
    "ordering-saved": _ordering(
        "order as in Transformer Engine's op fuser: S saved, dX starts with dS A", _Saved
    ),
}
