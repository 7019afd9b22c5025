"""LoRA layers over weights that another library stores and multiplies, in 4 or 8 bits.

    Y = base(X) + s (X̃ Aᵀ) B°ᵀ

`base(X)` and its backward `dY' W` are the library's, everything else is the operator's. What that
backward gets is `dY' = dY (I − V Vᵀ)`, so the projection is the same as in any other layer.
Shapes: T tokens, K in, N out, Q basis size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_kernels.layers.projected import ProjectedLoRA

# Where peft has the layers over quantised weights, and whose they are. All of them compute
# `base_layer(x)` and add the adapter to it, which is what makes another one a line here.
_LIBRARIES = {"peft.tuners.lora.bnb": "bitsandbytes", "peft.tuners.lora.torchao": "torchao"}
# A right gradient is at most as far off as the library rounds its input (8 bits: some hundredths);
# a wrong one has nothing to do with random directions and is off by its whole length.
_LARGEST_ERROR = 0.3
_DIRECTIONS = 32


class QuantisedLoRA(ProjectedLoRA):
    """Mixed into a LoRA layer of peft whose base layer computes its own product.

    The adapter is computed in the dtype of that product, whatever its layer made of the input.
    """

    def _accelerated(self, x: Tensor, adapter: str) -> Tensor:
        base = self.base_layer(x)
        return self._operator(x, None, None, adapter, base=base)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (self.stock,), self.__dict__  # a pickle finds no class that is made here


def why_wrong_gradient(layer: LoraLayer) -> str | None:
    """Why what lies before a layer would be trained wrongly, whoever computes the adapter.

    A library may round the input too and leave that out of its backward, or pass none back at all.
    None where the gradient of the base product is right, or where no such product can be asked for.
    """
    base: Any = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if weight is None or weight.is_meta or _is_plain(base):
        return None
    what = f"its base layer, a {type(base).__name__} over a {type(weight).__name__},"
    try:
        error = _gradient_error(base, layer.in_features, weight)
    except Exception as problem:  # of a library that nobody here may know
        if library_of(layer) is None:
            return None
        return f"{what} could not be asked for its gradient ({type(problem).__name__}: {problem})"
    if error <= _LARGEST_ERROR:
        return None
    found = "no gradient" if error == float("inf") else f"a gradient that is {error:.0%} off"
    return (
        f"{what} passes back {found}, so that nothing that lies before it is trained rightly, "
        "with peft's layers neither: quantise weights alone, not activations"
    )


def _is_plain(base: Any) -> bool:
    """Whether torch computes the product of the base layer, and so its gradient."""
    return (
        type(base) in (nn.Linear, Conv1D)
        and "forward" not in base.__dict__
        and type(base.weight) in (nn.Parameter, Tensor)
        and base.weight.is_floating_point()
    )


@torch.inference_mode(False)
@torch.enable_grad()
def _gradient_error(base: Any, K: int, weight: Tensor) -> float:
    """How far `2 h dXᵀ` is from `(base(h) − base(−h)) dYᵀ` for random `h`, `X`, `dY`; inf: no `dX`.

    Not for `h = X`: a layer that scales its input by the largest element passes that test with any
    gradient of the scale.
    """
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)

    def product(rows: Tensor) -> tuple[Tensor, Tensor]:
        # All inputs ask for a gradient: without, bitsandbytes lays its weight out for evaluation.
        x = rows.to(weight.device, dtype).requires_grad_()
        return x, base(x)

    x, y = product(torch.randn(1, K, generator=generator))
    dy = torch.randn(y.shape, generator=generator).to(y)
    (dx,) = torch.autograd.grad(y, x, dy, allow_unused=True) if y.requires_grad else (None,)
    if dx is None:
        return float("inf")
    directions = torch.randn(_DIRECTIONS, K, generator=generator)
    h, found = product(torch.cat([directions, -directions]))
    there, back = found.detach().float().chunk(2)
    right = (there - back) @ dy.float().mT
    error = torch.linalg.vector_norm(2 * h[:_DIRECTIONS].detach().float() @ dx.float().mT - right)
    return float(error / torch.linalg.vector_norm(right).clamp_min(torch.finfo(dtype).tiny))


def library_of(layer: LoraLayer) -> str | None:
    """The library that multiplies the weight of a stock layer of peft, if it is one we know."""
    return _LIBRARIES.get(type(layer).__module__)


@cache
def quantised(stock: type) -> type[QuantisedLoRA]:
    """The class for layers of a class of peft: `quantised(Linear4bit).adopt(layer, ...)`."""
    return type(f"Grasp{stock.__name__}", (QuantisedLoRA, stock), {"stock": stock})


def _empty(stock: type) -> QuantisedLoRA:
    return quantised(stock).__new__(quantised(stock))
