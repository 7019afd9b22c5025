"""The order in which published fused LoRA layers issue their library calls, written anew.

    Y = X Wᵀ, += S Bᵀ;  dX = dY W, += dS A;  `X Aᵀ` computed again in the backward

It shows what the order costs on the same library, without projection, bias, dropout or quantised
weights. It is no product and stands for none.
Shapes: T tokens, K in, N out, R LoRA rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels.provider import Provider, Weights


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, W, A, B, s = inputs
        ctx.save_for_backward(x, W, A, B)
        ctx.scaling = s
        return (x @ W.T).addmm_(x @ A.T, B.T, alpha=s)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, W, A, B), s = outputs, ctx.saved_tensors, ctx.scaling
        dS = dy @ B
        dA = s * (dS.T @ x)
        dB = s * (dy.T @ (x @ A.T))
        dx = (dy @ W).addmm_(dS, A, alpha=s)
        return dx, None, dA, dB, None


class OrderedLayer(nn.Module):
    """A LoRA layer in that order."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.scaling = weights.scaling
        self.weight = nn.Parameter(weights.weight, requires_grad=False)
        self.lora_A = nn.Parameter(weights.lora_A.clone())
        self.lora_B = nn.Parameter(weights.lora_B.clone())

    def forward(self, x: Tensor) -> Tensor:
        """`Y[T, N]` from `X[T, K]`."""
        return _Addmm.apply(x, self.weight, self.lora_A, self.lora_B, self.scaling)


ORDERINGS: dict[str, Provider] = {
    "ordering-addmm": Provider(
        "order as in axolotl: dY B once, X Aᵀ again, accumulating products", OrderedLayer
    ),
}
