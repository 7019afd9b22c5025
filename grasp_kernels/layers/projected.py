"""The common base of the layers: basis, closure, and peft's own forward where they must.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from grasp_kernels.layers.closed import ClosedLayer
from grasp_kernels.models.sharding import is_slice
from grasp_kernels.ops import lora_linear, project_gradient
from grasp_kernels.ops.gated import Gate
from grasp_kernels.ops.projection import is_transforming, project_columns

# Reasons for peft's forward without an adapter to compute: no factor is read, no warning given.
_META = "the input has no data"
_IDLE = ("adapters are disabled", "the adapter is merged", "0 active adapters", _META)
# Reasons for operations of torch, which torch transforms in every way: see `_in_torch`.
_TRANSFORM = "the call is under torch.func, forward-mode differentiation, an export or a trace"
_MODE = "a mode of torch counts, keeps or replaces every operation"
_SUBCLASS = "the input is a subclass of Tensor"
_SCALING = "the scaling is a tensor"
_IN_TORCH = (_TRANSFORM, _MODE, _SUBCLASS, _SCALING)


class ProjectedLoRA(ClosedLayer):
    """LoRA layer of peft with a projected gradient: `class Ours(ProjectedLoRA, TheirLayer)`.

    `Ours._accelerated(x, adapter, source)` calls the operator for `Y[..., N]`.
    Parameters, state-dict keys, merging and adapter management are peft's. Where the operator does
    not apply (see `why_stock`) the stock forward runs, with the gradient of its output projected
    and with one warning for each model.

    Attributes:
        project: "residual", or "weights" for a writer before a norm, see `lora_linear`.
        backend: "auto" or the name of a backend.
    """

    project: str
    backend: str
    _foreign = (*ClosedLayer._foreign, "project", "backend")

    def set_projection(
        self,
        write_basis: Tensor | None,
        project: str,
        closed: bool,
        backend: str,
        told: set[str] | None = None,
    ) -> None:
        """Set the basis `V[N, Q]` and the options, see the class and `set_basis`."""
        self.project = project
        self.backend = backend
        self.set_basis(write_basis, closed, self.get_base_layer().weight, told)

    def why_stock(self, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        """Say why peft's own forward computes this call, or None if the operator does."""
        if args or any(value is not None for value in kwargs.values()):
            return f"extra arguments {sorted(kwargs)}"
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "the adapter is merged"
        if x.is_meta and self.get_base_layer().weight.is_meta:
            return _META
        active = self._active()
        if active and (reason := self._why_in_torch(x, active)):
            return reason
        return self._why_not(x, *active) if len(active) == 1 else f"{len(active)} active adapters"

    def _why_in_torch(self, x: Tensor, active: list[str]) -> str | None:
        if any(adapter in self.lora_variant for adapter in active):
            return None  # a formula of its own
        if is_transforming():
            return _TRANSFORM
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0:
            return _MODE
        if type(x) not in (Tensor, nn.Parameter):
            return _SUBCLASS
        scalings = (self.scaling[adapter] for adapter in active)
        return _SCALING if any(isinstance(scaling, Tensor) for scaling in scalings) else None

    def _why_not(self, x: Tensor, adapter: str) -> str | None:
        """Say why the one active adapter or the base layer needs peft's forward, or None."""
        return why_adapter_never(self, adapter)

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def forward(self, x: Tensor, *args: Any, source: Gate | None = None, **kwargs: Any) -> Tensor:
        """Return `Y[..., N]` from `X[..., K]`; `source` as for `lora_linear`."""
        if self.new_adapters and not (torch.compiler.is_compiling() or is_transforming()):
            self.look_at_new()
        reason = self.why_stock(x, *args, **kwargs)
        if reason is not None and reason not in _IN_TORCH:
            return self._stock_forward(reason, x, *args, **kwargs)
        self.move_basis(x.device)
        if reason is None:
            return self._accelerated(x, self._active()[0], source)
        self._tell_stock(reason)
        return self._in_torch(x)

    def _in_torch(self, x: Tensor) -> Tensor:
        """Compute peft's forward on `B°`; torch takes its gradient through the projection.

        Nothing is written, so this also serves where weights cannot be written: under transforms.
        """
        V = self.write_basis
        if V is None:
            return super().forward(x)
        y = base = self.base_layer(x)
        for name in self._active():
            lora_B = self.lora_B[name]
            A, B, b = self.lora_A[name].weight, lora_B.weight, lora_B.bias
            if name in self.closed_adapters:
                B = project_columns(B, V).to(B.dtype)
                b = b if b is None else project_columns(b, V).to(b.dtype)
            else:
                B = project_gradient(B.mT, V).mT
                b = b if b is None else project_gradient(b, V)
            S = F.linear(self.lora_dropout[name](self._cast_input_dtype(x, A.dtype)), A)
            y = y + F.linear(S, B, b) * self.scaling[name]
        y = y.to(base.dtype)
        return project_gradient(y, V) if self.project == "residual" else y

    def _operator(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, adapter: str, **options: Any
    ) -> Tensor:
        """Return `lora_linear` with an adapter of this layer."""
        lora_B, dropout = self.lora_B[adapter], self.lora_dropout[adapter]
        return lora_linear(
            x,
            weight,
            bias,
            self.lora_A[adapter].weight,
            lora_B.weight,
            self.scaling[adapter],
            lora_bias=lora_B.bias,
            write_basis=self.write_basis,
            project=self.project,
            closed=adapter in self.closed_adapters,
            dropout_p=dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0,
            backend=self.backend,
            **options,
        )

    def _tell_stock(self, reason: str) -> None:
        sentence = "LoRA layers run peft's own forward, which gives the same result but is not "
        if not torch.compiler.is_compiling():
            self._tell(reason, f"{sentence}accelerated: {reason}.")

    def _stock_forward(self, reason: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if reason in _IDLE:
            y = super().forward(x, *args, **kwargs)
        else:
            self._tell_stock(reason)
            with self.computing_closed():
                y = super().forward(x, *args, **kwargs)
        if self.project == "residual" and self.write_basis is not None:
            self.move_basis(y.device)
            y = project_gradient(y, self.write_basis)
        return y


def why_adapter_never(layer: LoraLayer, adapter: str, *, sharded: bool = False) -> str | None:
    """Say why the operator can never compute an adapter in its setup, or None if it can.

    `sharded` is for a model of FSDP2 outside of its forward: its weights are DTensors there.
    """
    if adapter in layer.lora_variant:
        return f"the LoRA variant {type(layer.lora_variant[adapter]).__name__}"
    for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
        if has_hooks(factor):
            return "a child module has hooks"
        if type(factor) is not nn.Linear:
            return f"a child module is a {type(factor).__name__}"
        reason = why_no_matrix(factor.weight, sharded=sharded)
        if reason is not None:
            return reason
    if not isinstance(layer.lora_dropout[adapter], (nn.Dropout, nn.Identity)):
        return f"the dropout is a {type(layer.lora_dropout[adapter]).__name__}"
    return None


def why_no_matrix(weight: Tensor, *, sharded: bool) -> str | None:
    """Say why a weight is not here as a matrix, or None if it is."""
    if type(weight) not in (nn.Parameter, Tensor) and not sharded:
        return f"a weight is a {type(weight).__name__}"
    return "only a slice of a weight is on this process" if is_slice(weight) else None


def has_hooks(module: nn.Module) -> bool:
    """Say whether a call of the module does more than its forward.

    In a model spread over devices a hook of accelerate is the only wrapper of a forward. It moves
    the input to the device of the weight, where the hook of the block has moved it.
    """
    hook: Any = module.__dict__.get("_hf_hook")
    is_placed = type(hook).__name__ == "AlignDevicesHook"
    is_placed = is_placed and not (hook.offload or hook.io_same_device)
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not is_placed)
    )
