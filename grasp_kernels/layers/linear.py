"""GraspLoRALinear: peft's LoRA layer, computed by one operator that also projects the gradient.

Shapes: T tokens, K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_kernels.layers.projected import (
    ProjectedLoRA,
    has_hooks,
    why_adapter_never,
    why_no_matrix,
)
from grasp_kernels.ops.autocast import autocast_dtype
from grasp_kernels.ops.lora_linear import measured, padding
from grasp_kernels.ops.lora_linear.aten import write_weight
from grasp_kernels.ops.lora_linear.registry import KERNELS
from grasp_kernels.ops.projection import project_columns, project_rows


class GraspLoRALinear(ProjectedLoRA, lora.Linear):
    """A `peft.tuners.lora.Linear` whose forward is `grasp_kernels.lora_linear`.

    Bases, closure and what else it has in common with other layers are `ProjectedLoRA`'s.

    Attributes:
        padded_weight: the buffer in which the base weight lies after `pad_weight_`, or None.
    """

    stock = lora.Linear
    padded_weight: Tensor | None = None

    def __init__(
        self,
        *args: Any,
        write_basis: Tensor | None = None,
        read_basis: Tensor | None = None,
        project: str = "residual",
        closed: bool = True,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
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
        # peft builds its layer: the arguments of its constructor are others in each release.
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            target_modules=["linear"],
        )
        holder = inject_adapter_in_model(config, nn.ModuleDict({"linear": linear}), adapter_name)
        layer = holder["linear"]
        cls.adopt(layer, write_basis, read_basis, project, closed, backend)
        return layer

    def _forget(self) -> None:
        if self.padded_weight is not None:
            self.base_layer.weight.data = self.base_layer.weight.data.contiguous()
        for name in ("padded_weight", "_write_weight"):
            self.__dict__.pop(name, None)
        super()._forget()

    def set_projection(self, *projection: Any, **options: Any) -> None:
        self._write_weight: tuple[Any, Tensor | None] = (None, None)  # of another basis
        super().set_projection(*projection, **options)

    def _why_not(self, x: Tensor, adapter: str) -> str | None:
        reason = why_never(self, adapter)
        if reason is not None:
            return reason
        weight = self.base_layer.weight
        dtype = weight.dtype
        if x.device != weight.device:
            return f"input on {x.device} for a weight on {weight.device}"
        if x.dtype != dtype and autocast_dtype(x.device) is None:
            return f"input of {x.dtype} for a weight of {dtype}"
        return None

    def _accelerated(self, x: Tensor, adapter: str) -> Tensor:
        dtype = autocast_dtype(x.device) or x.dtype
        closed_factors = self._padded_factors(x.device, dtype, adapter)
        base, weight = self.base_layer, self._weight
        return self._operator(
            x,
            # A view that FSDP makes asks for a gradient when any parameter of its unit does.
            weight.detach() if weight.requires_grad else weight,
            base.bias,
            adapter,
            write_weight=self._cached_write_weight(dtype),
            closed_factors=closed_factors,
            padded_weight=None if closed_factors is None else self.padded_weight,
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # FSDP gathers a weight that was loaded anew at its old address, with its old version.
        self._write_weight = (None, None)
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def _weight(self) -> Tensor:
        """`W[N, K]`, which the Conv1D of transformers stores transposed."""
        weight = self.base_layer.weight
        return weight.mT if self.fan_in_fan_out else weight

    def _cached_write_weight(self, dtype: torch.dtype) -> Tensor | None:
        """`C = Vᵀ W [Q, K]` in a dtype, which only changes when the base weight does.

        None in compiled code, which cannot see that it did: there each backward makes it anew.
        """
        if self.write_basis is None or self.project != "residual" or torch.compiler.is_compiling():
            return None
        key, cached = self._write_weight
        weight = self._weight
        held = None if self.padded_weight is None else self.padded_parts(self._active()[0], dtype)
        place = None if held is None else held.write_weight
        at = None if place is None else place.data_ptr()
        now = (weight.data_ptr(), version(weight), weight.dtype, dtype, at)
        if now != key:
            # What an evaluation in inference mode makes, the next training step saves for backward.
            with torch.inference_mode(False), torch.no_grad():
                cached = write_weight(weight, self.write_basis).to(dtype)
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

    @torch.inference_mode(False)  # factors made in an evaluation may serve a training step
    @torch.no_grad()
    def _padded_factors(
        self, device: torch.device, dtype: torch.dtype, adapter: str
    ) -> tuple[Tensor, Tensor] | None:
        """A°, B° of this call in the padding of the base weight, where kernels read them; or None.

        An earlier graph has the same ones saved, or its factors were changed, which torch tells it.
        """
        if self.padded_weight is None or torch.compiler.is_compiling():
            return None
        kernels = self.backend in KERNELS
        kernels |= self.backend == "auto" and measured.prefers_kernels(device)
        held = self.padded_parts(adapter, dtype) if kernels else None
        if held is None:
            return None
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if adapter in self.closed_adapters:
            A, B = project_rows(A, self.read_basis), project_columns(B, self.write_basis)
        with torch.autograd._unsafe_preserve_version_counter(self.padded_weight):
            held.closed_A.copy_(A)
            held.closed_B.copy_(B)
        return held.closed_A, held.closed_B


def version(tensor: Tensor) -> int | None:
    """torch's count of in-place changes; tensors made in inference mode have none."""
    return None if tensor.is_inference() else tensor._version


def why_never(layer: nn.Module, adapter: str, *, sharded: bool = False) -> str | None:
    """Why the operator can never compute a peft layer as it is set up, or None if it can.

    `sharded` is for a model of FSDP2 outside of its forward, whose weights are DTensors until then.
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
        return f"a base weight of {base.weight.dtype}"
    return why_adapter_never(layer, adapter, sharded=sharded)
