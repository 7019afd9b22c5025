"""GraspLoRALinear: peft's LoRA layer, computed by one operator with a projected gradient.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_kernels.layers.plan import Plan, make_plan
from grasp_kernels.layers.projected import (
    ProjectedLoRA,
    has_hooks,
    why_adapter_never,
    why_no_matrix,
)
from grasp_kernels.ops.autocast import autocast_dtype
from grasp_kernels.ops.gated import Gate


class GraspLoRALinear(ProjectedLoRA, lora.Linear):
    """Layer `peft.tuners.lora.Linear`, computed by `grasp_kernels.lora_linear`.

    `x[..., K]` gives `Y[..., N]`. `write_basis` (`V[N, Q]`), `closed` and `backend` are those of
    `lora_linear`, all else is peft's. `ProjectedLoRA` has the common parts of the layers.
    """

    stock = lora.Linear
    _plan: Plan | None = None
    _foreign = (*ProjectedLoRA._foreign, "_plan")

    def __init__(
        self,
        *args: Any,
        write_basis: Tensor | None = None,
        closed: bool = True,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_projection(write_basis, "residual", closed, backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        lora_alpha: int = 32,
        *,
        adapter_name: str = "default",
        write_basis: Tensor | None = None,
        closed: bool = True,
        backend: str = "auto",
        **options: Any,
    ) -> GraspLoRALinear:
        """Make a layer from one `nn.Linear`, which is frozen, without a peft model.

        `options` are others of `LoraConfig`.
        """
        # peft builds its layer: the arguments of its constructor differ from release to release.
        config = LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=["linear"], **options)
        holder = inject_adapter_in_model(config, nn.ModuleDict({"linear": linear}), adapter_name)
        cls.adopt(holder["linear"], write_basis, "residual", closed, backend)
        return holder["linear"]

    def forward(self, x: Tensor, *args: Any, source: Gate | None = None, **kwargs: Any) -> Tensor:
        """Return `Y[..., N]` from `X[..., K]`; `source` as for `lora_linear`."""
        plan = self._plan
        if plan is None or args or kwargs or torch.compiler.is_compiling():
            return super().forward(x, *args, source=source, **kwargs)
        y = plan.run(self, x, source)
        return super().forward(x, source=source) if y is None else y

    def _why_not(self, x: Tensor, adapter: str) -> str | None:
        reason = why_never(self, adapter)
        if reason is not None:
            return reason
        weight = self.base_layer.weight
        if x.device != weight.device:
            return f"input on {x.device} for a weight on {weight.device}"
        if x.dtype != weight.dtype and autocast_dtype(x.device) is None:
            return f"input of {x.dtype} for a weight of {weight.dtype}"
        return None

    def _accelerated(self, x: Tensor, adapter: str, source: Gate | None) -> Tensor:
        if not torch.compiler.is_compiling():
            plan = self.__dict__["_plan"] = make_plan(self, x, adapter)
            y = None if plan is None else plan.run(self, x, source)
            if y is not None:
                return y
        base = self.base_layer
        weight = base.weight.mT if self.fan_in_fan_out else base.weight  # Conv1D stores [K, N]
        # A view made by FSDP requires a gradient if any parameter of its unit does.
        weight = weight.detach() if weight.requires_grad else weight
        return self._operator(x, weight, base.bias, adapter, source=source)


def why_never(layer: nn.Module, adapter: str, *, sharded: bool = False) -> str | None:
    """Say why the operator can never compute a peft layer in its setup, or None if it can.

    `sharded` is for a model of FSDP2 outside of its forward: its weights are DTensors there.
    """
    if not isinstance(layer, lora.Linear):
        return f"{type(layer).__module__}.{type(layer).__qualname__} is not peft's lora.Linear"
    base = layer.base_layer
    if type(base) is not (Conv1D if layer.fan_in_fan_out else nn.Linear):
        return f"the base layer is a {type(base).__name__}"
    if base.weight.requires_grad and base.weight.is_leaf:
        return "the base weight is trained too"
    if has_hooks(base):
        return "a child module has hooks"
    reason = why_no_matrix(base.weight, sharded=sharded)
    if reason is not None:
        return reason
    if not base.weight.is_floating_point():
        return f"the base weight has dtype {base.weight.dtype}"
    return why_adapter_never(layer, adapter, sharded=sharded)
