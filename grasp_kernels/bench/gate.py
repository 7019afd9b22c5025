"""No time is reported for a provider whose results are wrong.

Shapes: T tokens, K in, N out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.bench.providers import Provider, Weights, trained
from grasp_kernels.testing import budget, relative_error

_TOKENS = 64  # enough to see a missing term, little enough for float64


def over_budget(provider: Provider, weights: Weights, stock: Provider) -> dict[str, float]:
    """The results whose error passes the budget of `testing.budget`: name -> error.

    Compared on the real weights of the case, against float64, with the error of `stock` as scale;
    `stock` computes the same function (with the hook if the provider projects).
    """
    generator = torch.Generator().manual_seed(1)
    N, K = weights.weight.shape
    dtype = weights.weight.dtype
    x, dy = (
        torch.randn(_TOKENS, width, generator=generator).to(weights.weight) for width in (K, N)
    )
    exact = _results(stock.build(_double(weights)), x.double(), dy.double())
    theirs = _results(stock.build(weights), x, dy)
    ours = _results(provider.build(weights), x, dy)
    errors = {name: relative_error(ours[name], value) for name, value in exact.items()}
    return {
        name: error
        for name, error in errors.items()
        if not error <= budget(relative_error(theirs[name], exact[name]), dtype)
    }


def _results(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.requires_grad_()
    y = layer(x)
    leaves = [x, *trained(layer)]
    names = ["dx", "dlora_A", "dlora_B"][: len(leaves)]
    gradients = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


def _double(weights: Weights) -> Weights:
    wide: dict[str, Any] = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in vars(weights).items()
    }
    return Weights(**wide)
