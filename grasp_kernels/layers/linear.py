"""GraspLoRALinear: peft's LoRA layer, computed by one operator that also projects the gradient.

Shapes: T tokens, K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from grasp_kernels.layers.factors import ClosedFactors
from grasp_kernels.ops import lora_linear, project_gradient
from grasp_kernels.ops.lora_linear import measured, padding
from grasp_kernels.ops.lora_linear.api import KERNELS
from grasp_kernels.ops.lora_linear.aten import write_weight
from grasp_kernels.ops.projection import project_columns, project_rows
from grasp_kernels.processes import is_away, is_slice, refuse_away, whole, write_whole_

# A factor counts as closed when its share along the basis is at rounding level; writing it again
# would change the last bit at every save.
_CLOSED_TO = 8


class GraspLoRALinear(lora.Linear):
    """A `peft.tuners.lora.Linear` whose forward is `grasp_kernels.lora_linear`.

    Parameters, state-dict keys, merging and adapter management are peft's. Where the operator does
    not apply (see `why_stock`) the stock forward runs, with the same projection of its gradient.
    Closed layers keep `Vᵀ ΔW = 0` and `ΔW U = 0` in whatever leaves them: forward, state dict,
    merged weights.

    Attributes:
        write_basis: `V[N, Q]`, float32, or None. Not a buffer: those are rounded by FSDP in mixed
            precision, and sent around by DDP in every forward.
        read_basis: `U[K, P]`, float32, not a buffer either, or None.
        project: "residual" or "weights", see `lora_linear`.
        closed_adapters: names of the adapters that are kept closed.
        backend: "auto" or the name of a backend.
        factors: A°, B° of all layers of the model, where kernels make them.
        padded_weight: the buffer in which the base weight lies after `pad_weight_`, or None.
    """

    write_basis: Tensor | None
    read_basis: Tensor | None
    project: str
    closed_adapters: frozenset[str]
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
        self.close_()
        for name in ("write_basis", "read_basis"):
            delattr(self, name)
        if self.padded_weight is not None:
            self.base_layer.weight.data = self.base_layer.weight.data.contiguous()
        own = ("project", "closed_adapters", "backend", "factors", "padded_weight", "_write_weight")
        for name in own:
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
        weight = self.get_base_layer().weight
        for name, basis in (("write_basis", write_basis), ("read_basis", read_basis)):
            if basis is not None:
                basis = basis.detach().to(torch.float32)
            setattr(self, name, basis)
        self._move_bases(weight.device)
        self.project = project
        self.closed_adapters = frozenset(self.lora_A) if closed else frozenset()
        self.backend = backend
        if factors is not None or "factors" not in self.__dict__:
            self.factors = factors or ClosedFactors()
        self.__dict__.setdefault("padded_weight", None)
        self._write_weight: tuple[Any, Tensor | None] = (None, None)
        self.close_()

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
        dtype = self.base_layer.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            return f"input of {x.dtype} for a weight of {dtype}"
        return None

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Y[..., N]` from `X[..., K]`."""
        if self.why_stock(x, *args, **kwargs) is not None:
            return self._stock_forward(x, *args, **kwargs)
        (adapter,) = self._active()
        self._move_bases(x.device)
        closed_factors = self._closed_factors(x, adapter)
        base, lora_B, dropout = self.base_layer, self.lora_B[adapter], self.lora_dropout[adapter]
        return lora_linear(
            x,
            # A view that FSDP makes asks for a gradient when any parameter of its unit does.
            base.weight.detach() if base.weight.requires_grad else base.weight,
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
            self._move_bases(y.device)
            y = project_gradient(y, self.write_basis)
        return y

    def _move_bases(self, device: torch.device) -> None:
        """To the device of the weights, which FSDP may move without a word."""
        for name in ("write_basis", "read_basis"):
            basis = getattr(self, name)
            if basis is not None and basis.device != device and device.type != "meta":
                setattr(self, name, basis.to(device))

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
        weight = self.base_layer.weight
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

        The parameter stays itself and becomes a view; `release` makes it contiguous again.
        """
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

    @torch.no_grad()
    def close_(self) -> None:
        """Write `A°`, `B°`, `b°` into the parameters; the function of the layer stays as it is.

        All processes must call it where the parameters are DTensors.

        Raises:
            ValueError: FSDP or DeepSpeed has left a slice of a factor here.
        """
        U, V = self.read_basis, self.write_basis
        for name in self.closed_adapters & self.lora_A.keys():
            if U is not None:
                refuse_away(f"lora_A of the adapter {name!r}", self.lora_A[name].weight)
            if V is not None:
                refuse_away(f"lora_B of the adapter {name!r}", self.lora_B[name].weight)
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            _close_(lora_A.weight, project_rows, U)
            _close_(lora_B.weight, project_columns, V)
            if lora_B.bias is not None:
                _close_(lora_B.bias, project_columns, V)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """peft's `ΔW`, which merging uses, of the closed factors."""
        self.close_()
        return super().get_delta_weight(adapter)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A state dict visits this layer before the factors below it, so they are stored closed;
        # closing in place (not a copy) makes the checkpoint the very state that training goes on
        # from, so that a resumed run repeats an uninterrupted one bit by bit. FSDP visits the
        # processes that save nothing as well, with their slices.
        if not any(is_away(factor.weight) for factor in self.lora_B.values()):
            self.close_()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # FSDP gathers a weight that was loaded anew at its old address, with its old version.
        self._write_weight = (None, None)
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraspLoRALinear:
        super()._apply(fn, recurse)
        self._move_bases(self.get_base_layer().weight.device)
        return self


def why_never(layer: nn.Module, adapter: str, *, sharded: bool = False) -> str | None:
    """Why the operator can never compute a peft layer as it is set up, or None if it can.

    `sharded` is for a model of FSDP2 outside of its forward, whose weights are DTensors until then.
    """
    if not isinstance(layer, lora.Linear):
        return f"{type(layer).__module__}.{type(layer).__qualname__} is not peft's lora.Linear"
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return f"the base layer is a {type(base).__name__}"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out weights"
    if adapter in layer.lora_variant:
        return f"the LoRA variant {type(layer.lora_variant[adapter]).__name__}"
    if base.weight.requires_grad and base.weight.is_leaf:
        return "the base weight is trained too"
    children = (base, layer.lora_A[adapter], layer.lora_B[adapter])
    if any(_has_hooks(child) for child in children):
        return "a child module has hooks"
    for child in children:
        if type(child) is not nn.Linear:
            return f"a child module is a {type(child).__name__}"
        if type(child.weight) not in (nn.Parameter, Tensor) and not sharded:
            return f"a weight is a {type(child.weight).__name__}"
        if is_slice(child.weight):
            return "a weight is here as a slice only"
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
        or "forward" in module.__dict__  # tensor parallelism of transformers
    )


def _close_(
    parameter: Tensor, projection: Callable[[Tensor, Tensor | None], Tensor], basis: Tensor | None
) -> None:
    if basis is None or parameter.is_meta:
        return
    weight = whole(parameter)
    closed = projection(weight, basis.to(weight.device))
    removed = torch.linalg.vector_norm(closed - weight.to(closed.dtype))
    rounding = _CLOSED_TO * torch.finfo(weight.dtype).eps
    if removed > rounding * torch.linalg.vector_norm(closed):
        write_whole_(parameter, closed)
