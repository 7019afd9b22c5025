"""GraspLoRALinear: peft's LoRA layer, computed by one operator that also projects the gradient.

Shapes: T tokens, K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_kernels.layers.closed import ClosedLayer
from grasp_kernels.layers.factors import ClosedFactors
from grasp_kernels.ops import lora_linear, project_gradient
from grasp_kernels.ops.lora_linear import measured, padding
from grasp_kernels.ops.lora_linear.api import KERNELS
from grasp_kernels.ops.lora_linear.aten import write_weight


class GraspLoRALinear(ClosedLayer, lora.Linear):
    """A `peft.tuners.lora.Linear` whose forward is `grasp_kernels.lora_linear`.

    Parameters, state-dict keys, merging and adapter management are peft's. Where the operator does
    not apply (see `why_stock`) the stock forward runs, with the same projection of its gradient.
    Closed layers keep `Vᵀ ΔW = 0` and `ΔW U = 0` in whatever leaves them: forward, state dict,
    merged weights.

    Attributes:
        write_basis, read_basis, closed_adapters: see `ClosedLayer`.
        project: "residual" or "weights", see `lora_linear`.
        backend: "auto" or the name of a backend.
        factors: A°, B° of all layers of the model, where kernels make them.
        padded_weight: the buffer in which the base weight lies after `pad_weight_`, or None.
    """

    project: str
    backend: str
    factors: ClosedFactors
    padded_weight: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        *args: Any,
        write_basis: Tensor | None = None,
        read_basis: Tensor | None = None,
        project: str = "residual",
        closed: bool = True,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name, config, *args, **kwargs)
        self.set_projection(write_basis, read_basis, project, closed, backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        lora_alpha: int = 32,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
        write_basis: Tensor | None = None,
        read_basis: Tensor | None = None,
        project: str = "residual",
        closed: bool = True,
        backend: str = "auto",
    ) -> GraspLoRALinear:
        """Adapt one `nn.Linear` in a script without a peft model; its weight is frozen."""
        config = LoraConfig(
            r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora
        )
        linear.requires_grad_(False)
        return cls(
            linear,
            adapter_name,
            config,
            r=r,
            lora_alpha=lora_alpha,
            write_basis=write_basis,
            read_basis=read_basis,
            project=project,
            closed=closed,
            backend=backend,
        )

    @classmethod
    def adopt(cls, layer: lora.Linear, *projection: Any) -> None:
        """Turn a stock layer into this class in place; arguments as for `set_projection`."""
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.set_projection(*projection)

    def release(self) -> None:
        """Turn this layer back into peft's own, in place, with the weights it computed with."""
        self.drop_bases()
        if self.padded_weight is not None:
            self.base_layer.weight.data = self.base_layer.weight.data.contiguous()
        for name in ("project", "backend", "factors", "padded_weight", "_write_weight"):
            self.__dict__.pop(name)
        self.__class__ = lora.Linear

    def set_projection(
        self,
        write_basis: Tensor | None,
        read_basis: Tensor | None,
        project: str,
        closed: bool,
        backend: str,
        factors: ClosedFactors | None = None,
    ) -> None:
        """Set bases and options; the adapters that exist now are closed if `closed`.

        `factors` is shared by the layers of a model, whose closed factors come out of one launch.
        """
        self.project = project
        self.backend = backend
        if factors is not None or "factors" not in self.__dict__:
            self.factors = factors or ClosedFactors()
        self.__dict__.setdefault("padded_weight", None)
        self._write_weight: tuple[Any, Tensor | None] = (None, None)
        self.set_bases(write_basis, read_basis, closed, self.get_base_layer().weight.device)

    def why_stock(self, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        """None when the operator computes this call, else why peft's own forward does."""
        if args or any(value is not None for value in kwargs.values()):
            return f"extra arguments {sorted(kwargs)}"
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "the adapter is merged"
        active = self._active()
        if len(active) != 1:
            return f"{len(active)} active adapters"
        reason = why_never(self, active[0])
        if reason is not None:
            return reason
        dtype = self._weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            return f"input of {x.dtype} for a weight of {dtype}"
        return None

    @property
    def _weight(self) -> Tensor:
        """`W[N, K]`, which the Conv1D of transformers stores transposed."""
        weight = self.base_layer.weight
        return weight.mT if self.fan_in_fan_out else weight

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Y[..., N]` from `X[..., K]`."""
        if self.why_stock(x, *args, **kwargs) is not None:
            return self._stock_forward(x, *args, **kwargs)
        (adapter,) = self._active()
        closed_factors = self._closed_factors(x, adapter)
        base, lora_B, dropout = self.base_layer, self.lora_B[adapter], self.lora_dropout[adapter]
        return lora_linear(
            x,
            self._weight,
            base.bias,
            self.lora_A[adapter].weight,
            lora_B.weight,
            self.scaling[adapter],
            lora_bias=lora_B.bias,
            write_basis=self.write_basis,
            read_basis=self.read_basis,
            write_weight=self._cached_write_weight(),
            closed_factors=closed_factors,
            padded_weight=self._padding_of(adapter, closed_factors),
            project=self.project,
            closed=adapter in self.closed_adapters,
            dropout_p=dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0,
            backend=self.backend,
        )

    def _stock_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.close_()
        y = super().forward(x, *args, **kwargs)
        if self.project == "residual" and self.write_basis is not None:
            y = project_gradient(y, self.write_basis)
        return y

    def _closed_factors(self, x: Tensor, adapter: str) -> tuple[Tensor, Tensor] | None:
        """A°, B° from the launch that makes those of all layers; None: the operator makes them."""
        kernels = self.backend in KERNELS
        kernels |= self.backend == "auto" and measured.prefers_kernels(x.device)
        if not kernels or torch.compiler.is_compiling():
            return None
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        return self.factors.of(self, adapter, dtype)

    def _cached_write_weight(self) -> Tensor | None:
        """`C = Vᵀ W [Q, K]`, which only changes when the base weight does."""
        if self.project != "residual" or self.write_basis is None:
            return None
        key, cached = self._write_weight
        if torch.compiler.is_compiling():
            return cached
        weight = self._weight
        held = self.padded_parts(self._active()[0], weight.dtype)
        place = None if held is None else held.write_weight
        at = None if place is None else place.data_ptr()
        now = (weight.data_ptr(), weight._version, weight.dtype, at)
        if now != key:
            with torch.no_grad():
                cached = write_weight(weight, self.write_basis)
                if place is not None:
                    cached = place.copy_(cached)
            self._write_weight = (now, cached)
        return cached

    @torch.no_grad()
    def pad_weight_(self) -> None:
        """Lay the base weight out with spare columns and rows, in which the adapters that exist now
        and the write basis can ride along in wide library products (`ops.lora_linear.padding`).

        The parameter stays itself and becomes a view; `release` makes it contiguous again. The
        transposed weight of a Conv1D, which no large model has, stays as it is.
        """
        if self.fan_in_fan_out:
            return
        weight = self.base_layer.weight
        R = max((lora_A.weight.shape[0] for lora_A in self.lora_A.values()), default=0)
        Q = 0 if self.write_basis is None else self.write_basis.shape[1]
        self.padded_weight = padding.pad(weight, padding.spare(R, Q))
        weight.data = self.padded_weight[: weight.shape[0], : weight.shape[1]]

    def padded_parts(self, adapter: str, dtype: torch.dtype) -> padding.Padded | None:
        """Where the padding holds the factors of an adapter, in the dtype of the weight alone."""
        buffer, weight = self.padded_weight, self.base_layer.weight
        if buffer is not None and weight.data_ptr() != buffer.data_ptr():
            buffer = self.padded_weight = None  # moved, cast or copied since
        if buffer is None or dtype != buffer.dtype:
            return None
        (N, K), R = weight.shape, self.lora_A[adapter].weight.shape[0]
        projects = self.write_basis is not None and self.project == "residual"
        Q = self.write_basis.shape[1] if self.write_basis is not None and projects else 0
        return padding.parts(buffer, N, K, R, Q) if buffer.shape[0] - N >= R + Q else None

    def _padding_of(self, adapter: str, closed: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """The buffer, if the factors of this call lie in it."""
        if closed is None or self.padded_parts(adapter, closed[0].dtype) is None:
            return None
        return self.padded_weight


def why_never(layer: nn.Module, adapter: str) -> str | None:
    """Why the operator can never compute a peft layer as it is set up, or None if it can."""
    if not isinstance(layer, lora.Linear):
        return f"{type(layer).__module__}.{type(layer).__qualname__} is not peft's lora.Linear"
    base = layer.base_layer
    if type(base) is not (Conv1D if layer.fan_in_fan_out else nn.Linear):
        return f"the base layer is a {type(base).__name__}"
    if adapter in layer.lora_variant:
        return f"the LoRA variant {type(layer.lora_variant[adapter]).__name__}"
    if base.weight.requires_grad:
        return "the base weight is trained too"
    children = (base, layer.lora_A[adapter], layer.lora_B[adapter])
    if any(_has_hooks(child) for child in children):
        return "a child module has hooks"
    if any(type(child.weight) is not nn.Parameter for child in children):
        return f"a weight is a {type(base.weight).__name__}"
    if not base.weight.is_floating_point():
        return f"a base weight of {base.weight.dtype}"
    if not isinstance(layer.lora_dropout[adapter], (nn.Dropout, nn.Identity)):
        return f"the dropout is a {type(layer.lora_dropout[adapter]).__name__}"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in module.__dict__
    )
