"""LoRA layers over weights that another library stores and multiplies, in 4 or 8 bits.

    Y = base(X) + s (X̃ A°ᵀ) B°ᵀ

`base(X)` and its backward `dY' W` are the library's, everything else is the operator's. What that
backward gets is `dY' = dY (I − V Vᵀ)`, so the projection is the same as in any other layer.
Shapes: T tokens, K in, N out, Q write basis size.
"""

from __future__ import annotations

from functools import cache

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from grasp_kernels.layers.projected import ProjectedLoRA

# Where peft has the layers over quantised weights, and whose they are. All of them compute
# `base_layer(x)` and add the adapter to it, which is what makes another one a line here.
_LIBRARIES = {"peft.tuners.lora.bnb": "bitsandbytes", "peft.tuners.lora.torchao": "torchao"}


class QuantisedLoRA(ProjectedLoRA):
    """Mixed into a LoRA layer of peft whose base layer computes its own product.

    The adapter is computed in the dtype of that product, whatever its layer made of the input.
    """

    def _accelerated(self, x: Tensor, adapter: str) -> Tensor:
        base = self.base_layer(x)
        return self._operator(x, None, None, adapter, base=base)


def library_of(layer: LoraLayer) -> str | None:
    """The library that multiplies the weight of a stock layer of peft, if it is one we know."""
    return _LIBRARIES.get(type(layer).__module__)


@cache
def quantised(stock: type) -> type[QuantisedLoRA]:
    """The class for layers of a class of peft: `quantised(Linear4bit).adopt(layer, ...)`."""
    return type(f"Grasp{stock.__name__}", (QuantisedLoRA, stock), {"stock": stock})
