"""The frozen layer, and stock peft in the ways people run it.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from benchmarks.kernels.provider import Bases, Provider, Weights
from grasp_kernels.models.names import base_name
from grasp_kernels.ops import project_gradient


def stock_layer(weights: Weights, adapters: str = "base") -> lora.Linear:
    """peft's layer on the weights of a case."""
    N, K = weights.weight.shape
    R = weights.lora_A.shape[0]
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(weights.weight, requires_grad=False)
    layer = lora.Linear(linear, "default", LoraConfig(r=R, lora_alpha=1), r=R, lora_alpha=1)
    for factors, value in ((layer.lora_A, weights.lora_A), (layer.lora_B, weights.lora_B)):
        factors["default"].weight = nn.Parameter(in_dtype(value, adapters))
    layer.scaling["default"] = weights.scaling
    return layer


def in_dtype(factor: Tensor, adapters: str) -> Tensor:
    """A copy of a factor in the dtype that a provider keeps adapters in; float64 stays."""
    if adapters == "base":
        return factor.clone()
    return factor.to(torch.promote_types(factor.dtype, torch.float32), copy=True)


def lora_layers(module: nn.Module) -> dict[str, lora.Linear]:
    """peft's layers by their name in the base model; a bare layer is called ""."""
    return {
        base_name(name): layer
        for name, layer in module.named_modules()
        if isinstance(layer, lora.Linear)
    }


def on_peft(what: str, adapt: Callable[[nn.Module, Bases], nn.Module], **options: Any) -> Provider:
    """A provider that rebuilds peft's layers in place, for one layer and for models alike."""

    def build(weights: Weights) -> nn.Module:
        bases = {} if weights.write_basis is None else {"": weights.write_basis}
        return adapt(stock_layer(weights, options.get("adapters", "base")), bases)

    return Provider(what, build, adapt, **options)


def _stock(module: nn.Module, bases: Bases) -> nn.Module:
    return module


def _hooked(module: nn.Module, bases: Bases) -> nn.Module:
    for name, layer in lora_layers(module).items():
        if name in bases:
            layer.register_forward_hook(_Projection(bases[name]))
    return module


class _Projection:
    """A forward hook that projects the gradient of the output, the plain way to do it."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    def __call__(self, layer: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        return project_gradient(y, self.basis)


class _Autocast(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        weights = [p for p in module.parameters() if not p.requires_grad]
        self.dtype, self.device_type = weights[0].dtype, weights[0].device.type

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(self.device_type, self.dtype):
            return self.module(*inputs)


def _autocast(module: nn.Module, bases: Bases) -> nn.Module:
    return _Autocast(module)


def _float32_is_the_base(device: torch.device, dtype: torch.dtype) -> str | None:
    return "in float32 it is the provider 'peft'" if dtype == torch.float32 else None


PEFT_PROVIDERS: dict[str, Provider] = {
    "frozen": Provider(
        "the frozen layer alone, with its dX",
        lambda weights: stock_layer(weights).base_layer,
        _stock,
        adapters="none",
        by_default=True,
    ),
    "peft": on_peft("stock peft, adapter in the dtype of the base", _stock, by_default=True),
    "peft-default": on_peft(
        "stock peft as it comes: float32 adapter, run under autocast",
        _autocast,
        adapters="float32",
        unavailable=_float32_is_the_base,
        by_default=True,
    ),
    "peft-hook": on_peft(
        "peft with a hook on writers that projects the gradient of the output",
        _hooked,
        projects=True,
        by_default=True,
    ),
}
