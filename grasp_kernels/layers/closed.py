"""What every closed layer does: its factors are out of the subspace in whatever leaves it.

Shapes: K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.ops.projection import project_columns, project_rows
from grasp_kernels.processes import is_away, refuse_away, whole, write_whole_

# A factor counts as closed when its share along the basis is at rounding level; writing it again
# would change the last bit at every save.
_CLOSED_TO = 8
# Beside a layer class of peft, whose attributes are not declared; with LoraLayer as its base Python
# would refuse to swap the class of an instance.
_LAYER: Any = nn.Module


class ClosedLayer(_LAYER):
    """Mixed into a LoRA layer of peft, before it: `class Ours(ClosedLayer, TheirLayer)`.

    Closed layers keep `Vᵀ ΔW = 0` and `ΔW U = 0` in whatever leaves them: forward, state dict,
    merged weights.

    Attributes:
        stock: the class of peft that a layer becomes again when it is released.
        write_basis: `V[N, Q]`, float32, or None. Not a buffer: those are rounded by FSDP in mixed
            precision, and sent around by DDP in every forward.
        read_basis: `U[K, P]`, float32, not a buffer either, or None.
        closed_adapters: names of the adapters that are kept closed.
        frozen_reads: names of the adapters whose A is frozen, as `ContrastiveReads` leaves it.
    """

    stock: type
    write_basis: Tensor | None
    read_basis: Tensor | None
    closed_adapters: frozenset[str]
    frozen_reads: frozenset[str] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        """Carry the name of peft's class, which peft asks layers for; `__qualname__` stays ours."""
        super().__init_subclass__(**options)
        if "stock" in cls.__dict__:
            cls.__name__ = cls.stock.__name__

    def _get_name(self) -> str:
        return type(self).__qualname__  # what printing a model shows

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """peft's, which lets gradients reach all of an adapter, less the A that are frozen."""
        super().set_adapter(*args, **kwargs)
        for adapter in self.frozen_reads & set(self.lora_A):
            self.lora_A[adapter].weight.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """peft's; another adapter of that name will read as it likes."""
        super().delete_adapter(adapter_name)
        self.frozen_reads = self.frozen_reads - {adapter_name}

    def set_bases(
        self, write_basis: Tensor | None, read_basis: Tensor | None, closed: bool, weight: Tensor
    ) -> None:
        """Set the bases where `weight` is; the adapters that exist now are closed if `closed`."""
        for name, basis in (("write_basis", write_basis), ("read_basis", read_basis)):
            setattr(self, name, None if basis is None else basis.detach().to(torch.float32))
        self.move_bases(weight.device)
        self.closed_adapters = frozenset(self.lora_A) if closed else frozenset()
        self.close_()

    def move_bases(self, device: torch.device) -> None:
        """To the device of the weights, which FSDP may move without a word."""
        for name in ("write_basis", "read_basis"):
            basis = getattr(self, name)
            # A weight that is loaded later has no data yet, and a basis would lose its own.
            if basis is not None and basis.device != device and device.type != "meta":
                setattr(self, name, basis.to(device))

    def release(self) -> None:
        """Turn this layer back into peft's own, in place, with the weights it computed with."""
        self.close_()  # or raises, and nothing has changed
        self._forget()
        self.__class__ = self.stock

    def _forget(self) -> None:
        """Remove what peft's own class does not have."""
        for name in ("write_basis", "read_basis", "closed_adapters"):
            delattr(self, name)

    @torch.no_grad()
    def close_(self) -> None:
        """Write `A°`, `B°`, `b°` into the parameters; the function of the layer stays as it is.

        All processes must call it where the parameters are DTensors.

        Raises:
            ValueError: FSDP or DeepSpeed has left a slice of a factor here.
        """
        U, V = self.read_basis, self.write_basis
        for name in self.closed_adapters & self.lora_A.keys():
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            if U is not None:
                refuse_away(f"lora_A of the adapter {name!r}", lora_A.weight)
            if V is not None:
                refuse_away(f"lora_B of the adapter {name!r}", lora_B.weight)
            _close_(lora_A.weight, project_rows, U)
            _close_(lora_B.weight, project_columns, V)
            if lora_B.bias is not None:
                _close_(lora_B.bias, project_columns, V)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """peft's, which adds an adapter, perhaps to combine the others in it: they are closed."""
        if "closed_adapters" in self.__dict__:
            self.close_()
        super().update_layer(*args, **kwargs)

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """peft's `ΔW`, which merging uses, of the closed factors."""
        self.close_()
        return super().get_delta_weight(adapter, *args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A state dict visits this layer before the factors below it, so they are stored closed;
        # closing in place (not a copy) makes the checkpoint the very state that training goes on
        # from, so that a resumed run repeats an uninterrupted one bit by bit. FSDP visits the
        # processes that save nothing as well, with their slices.
        if not any(is_away(factor.weight) for factor in self.lora_B.values()):
            self.close_()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClosedLayer:
        # Bases only follow to another device: closure is as exact as they are.
        super()._apply(fn, recurse)
        self.move_bases(next(self.parameters()).device)
        return self


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
        # Past autograd's version counter: a backward that is still to come has saved A° and B°, so
        # a checkpoint or a reference model between forward and backward does not invalidate it.
        write_whole_(parameter.data, closed)
