"""Other fused LoRA layers, where they are installed; each is called as its own users would.

Read off their sources: unsloth 015bdef, axolotl 067b021, lorafusion c48d7fd. All three take
`x[batch, tokens, K]`. None is imported unless it is asked for: unsloth replaces parts of
transformers and peft when it is, for all that is timed beside it.
Shapes: T tokens, K in, N out, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.bench.peft_providers import stock_layer
from grasp_kernels.bench.provider import Provider, Weights

_Call = Callable[[Any, Tensor], Tensor]  # peft's layer and x -> y


class PeerLayer(nn.Module):
    """peft's parameters, computed by a peer."""

    def __init__(self, weights: Weights, call: _Call) -> None:
        super().__init__()
        self.layer, self.call = stock_layer(weights), call

    def forward(self, x: Tensor) -> Tensor:
        """`Y[T, N]` from `X[T, K]`."""
        return self.call(self.layer, x[None])[0]


def _unsloth(layer: Any, x: Tensor) -> Tensor:
    kernels = import_module("unsloth.kernels.fast_lora")
    return kernels.LoRA_W.apply(x, layer.base_layer.weight, None, *_factors(layer))


def _axolotl(layer: Any, x: Tensor) -> Tensor:
    return import_module("axolotl.kernels.lora").apply_lora_linear(layer, x)


def _lorafusion(layer: Any, x: Tensor) -> Tensor:
    fused = import_module("lorafusion.ops.lora_v1").fused_linear_lora
    A, B, scaling = _factors(layer)
    return fused(x, layer.base_layer.weight, A, B, scaling, dropout_p=0.0)


def _factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    return (
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
    )


def _unavailable(package: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec(package) is None:
        return f"{package} is not installed"
    if device.type != "cuda":
        return f"{package} needs a GPU"
    try:
        import_module(package)
    except Exception as error:  # whatever a foreign import raises, the others are still timed
        return f"{package} cannot be imported: {error}"
    return None


def _peer(package: str, what: str, call: _Call) -> Provider:
    return Provider(
        what,
        lambda weights: PeerLayer(weights, call),
        unavailable=partial(_unavailable, package),
        foreign=True,
    )


PEERS: dict[str, Provider] = {
    "unsloth": _peer("unsloth", "unsloth's LoRA_W", _unsloth),
    "axolotl": _peer("axolotl", "axolotl's apply_lora_linear", _axolotl),
    "lorafusion": _peer("lorafusion", "LoRAFusion's fused_linear_lora", _lorafusion),
}
