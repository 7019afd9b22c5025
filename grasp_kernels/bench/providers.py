"""What is compared. A provider builds one adapted layer; all of one case hold the same weights.

Shapes: K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from grasp_kernels.layers.linear import GraspLoRALinear
from grasp_kernels.ops import project_gradient


@dataclass(frozen=True)
class Weights:
    """`W[N, K]` and the adapter in the compute dtype; `V[N, Q]` or `U[K, P]` in float32."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    write_basis: Tensor | None
    read_basis: Tensor | None


@dataclass(frozen=True)
class Provider:
    """`projects` says whether the projection is part of what it computes."""

    build: Callable[[Weights], nn.Module]
    projects: bool


def _stock(weights: Weights) -> lora.Linear:
    """peft's layer with its adapter in the dtype of the base."""
    N, K = weights.weight.shape
    R = weights.lora_A.shape[0]
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(weights.weight, requires_grad=False)
    config = LoraConfig(r=R, lora_alpha=1)
    layer = lora.Linear(linear, "default", config, r=R, lora_alpha=1)
    for factors, value in ((layer.lora_A, weights.lora_A), (layer.lora_B, weights.lora_B)):
        factors["default"].weight = nn.Parameter(value.clone())
    layer.scaling["default"] = weights.scaling
    return layer


def _frozen(weights: Weights) -> nn.Module:
    return _stock(weights).base_layer


def _stock_with_hook(weights: Weights) -> nn.Module:
    """peft's layer whose output gradient is projected by a hook, the plain way to do it."""
    layer = _stock(weights)
    basis = weights.write_basis
    if basis is not None:
        layer.register_forward_hook(lambda module, inputs, y: project_gradient(y, basis))
    return layer


def _ours(project: bool) -> Callable[[Weights], nn.Module]:
    def build(weights: Weights) -> nn.Module:
        layer = _stock(weights)
        bases = (weights.write_basis, weights.read_basis) if project else (None, None)
        GraspLoRALinear.adopt(layer, *bases, "residual", True, "auto")
        return layer

    return build


PROVIDERS: dict[str, Provider] = {
    "frozen": Provider(_frozen, False),
    "peft": Provider(_stock, False),
    "peft-hook": Provider(_stock_with_hook, True),
    "grasp": Provider(_ours(project=False), False),
    "grasp-projected": Provider(_ours(project=True), True),
}


def trained(layer: nn.Module) -> list[Tensor]:
    """The parameters whose gradients a step computes."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def dtype_of(name: str) -> torch.dtype:
    """float32, float16 or bfloat16 by name."""
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"dtype {name!r} is unknown; use one of {sorted(dtypes)}.")
    return dtypes[name]
