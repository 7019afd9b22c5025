"""LoRA layers over weights stored and multiplied by another library, in 4 or 8 bits.

    Y = base(X) + s (X̃ Aᵀ) B°ᵀ

The library computes `base(X)` and its backward `dY' W`, the operator everything else. That backward
gets `dY' = dY (I − V Vᵀ)`, so the projection is the same as in any other layer.
Shapes: T tokens, K in, N out, Q basis size.
"""

from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_kernels.layers.closed import unpickled
from grasp_kernels.layers.projected import ProjectedLoRA
from grasp_kernels.ops.gated import Gate

# peft's layers over quantised weights, with their libraries. All of them compute `base_layer(x)`
# and add the adapter to it, so another library takes one line here.
_LIBRARIES = {"peft.tuners.lora.bnb": "bitsandbytes", "peft.tuners.lora.torchao": "torchao"}
# The error of a right gradient is at most the library's rounding of the input (8 bits: some
# hundredths). A wrong gradient is unrelated to random directions: its error is its whole length.
_LARGEST_ERROR = 0.3
_DIRECTIONS = 32


class QuantisedLoRA(ProjectedLoRA):
    """Compute a LoRA layer of peft over a base layer with its own product.

    The adapter is computed in the dtype of that product, whatever the dtype of the input.
    """

    def _accelerated(self, x: Tensor, adapter: str, source: Gate | None) -> Tensor:
        base = self.base_layer(x)
        return self._operator(x, None, None, adapter, base=base, source=source)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return unpickled, (quantised, self.stock), self.__dict__


def why_wrong_gradient(layer: LoraLayer) -> str | None:
    """Say why the modules before a layer would be trained wrongly with any adapter, or None.

    A library may round the input too and leave the rounding out of its backward, or pass no
    gradient back at all. None means that the gradient of the base product is right, or that there
    is no such product to test.
    """
    base: Any = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if weight is None or weight.is_meta:
        return None
    is_plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    if is_plain and type(base) in (nn.Linear, Conv1D) and "forward" not in base.__dict__:
        return None  # torch computes the product, and so its gradient
    what = f"its base layer, a {type(base).__name__} over a {type(weight).__name__},"
    try:
        error = _gradient_error(base, layer.in_features, weight)
    except Exception as problem:  # of a library that may be unknown here
        if library_of(layer) is None:
            return None
        return f"{what} could not be asked for its gradient ({type(problem).__name__}: {problem})"
    if error <= _LARGEST_ERROR:
        return None
    found = "no gradient" if error == float("inf") else f"a gradient that is {error:.0%} off"
    return (
        f"{what} passes back {found}, so everything before it is trained wrongly, with peft's own "
        "layers as well: quantise the weights alone, not the activations"
    )


@torch.inference_mode(False)
@torch.enable_grad()
def _gradient_error(base: Any, K: int, weight: Tensor) -> float:
    """Return the error of `2 h dXᵀ` from `(base(h) − base(−h)) dYᵀ`, inf without a `dX`.

    `h`, `X` and `dY` are random. `h` is not `X`: a layer that scales its input by the largest
    element passes the test at `h = X` with any gradient of the scale.
    """
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)

    def product(rows: Tensor) -> tuple[Tensor, Tensor]:
        # All inputs require a gradient; otherwise bitsandbytes lays its weight out for evaluation.
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
    """Return the known library behind the weight of a stock layer of peft, or None."""
    return _LIBRARIES.get(type(layer).__module__)


@cache
def quantised(stock: type) -> type[QuantisedLoRA]:
    """Return the class for layers of a class of peft: `quantised(Linear4bit).adopt(layer, ...)`."""
    return type(f"Grasp{stock.__name__}", (QuantisedLoRA, stock), {"stock": stock})
