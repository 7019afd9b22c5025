"""What every closed layer does: its factors are out of the subspace in whatever leaves it.

Shapes: K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.ops.projection import project_columns, project_rows

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
        write_basis: `V[N, Q]`, float32, non-persistent buffer, or None.
        read_basis: `U[K, P]`, float32, non-persistent buffer, or None.
        closed_adapters: names of the adapters that are kept closed.
    """

    stock: type
    write_basis: Tensor | None
    read_basis: Tensor | None
    closed_adapters: frozenset[str]

    def set_bases(
        self, write_basis: Tensor | None, read_basis: Tensor | None, closed: bool, weight: Tensor
    ) -> None:
        """Set the bases where `weight` is; the adapters that exist now are closed if `closed`."""
        for name, basis in (("write_basis", write_basis), ("read_basis", read_basis)):
            if basis is not None:
                # A weight that is loaded later has no data yet, and a basis would lose its own.
                device = basis.device if weight.is_meta else weight.device
                basis = basis.detach().to(device, torch.float32)
            self.register_buffer(name, basis, persistent=False)
        self.closed_adapters = frozenset(self.lora_A) if closed else frozenset()
        self.close_()

    def release(self) -> None:
        """Turn this layer back into peft's own, in place, with the weights it computed with."""
        self.close_()
        for name in ("write_basis", "read_basis", "closed_adapters"):
            delattr(self, name)
        self.__class__ = self.stock

    @torch.no_grad()
    def close_(self) -> None:
        """Write `A°`, `B°`, `b°` into the parameters; the function of the layer stays as it is."""
        for name in self.closed_adapters & self.lora_A.keys():
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            _close_(lora_A.weight, lambda A: project_rows(A, self.read_basis))
            _close_(lora_B.weight, lambda B: project_columns(B, self.write_basis))
            if lora_B.bias is not None:
                _close_(lora_B.bias, lambda b: project_columns(b, self.write_basis))

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
        # from, so that a resumed run repeats an uninterrupted one bit by bit.
        self.close_()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClosedLayer:
        # Bases only follow to another device. `bfloat16()` must not round them, since closure is as
        # exact as they are, and `to_empty()` must not empty them, since no checkpoint has them.
        bases = self.write_basis, self.read_basis
        super()._apply(fn, recurse)
        for name, basis in zip(("write_basis", "read_basis"), bases, strict=True):
            if basis is not None:
                setattr(self, name, basis.to(getattr(self, name).device))
        return self


def _close_(parameter: Tensor, projection: Callable[[Tensor], Tensor]) -> None:
    if parameter.is_meta:
        return
    closed = projection(parameter)
    if closed is parameter:
        return
    removed = torch.linalg.vector_norm(closed - parameter.to(closed.dtype))
    rounding = _CLOSED_TO * torch.finfo(parameter.dtype).eps
    if removed > rounding * torch.linalg.vector_norm(closed):
        # Past autograd's version counter: a backward that is still to come has saved A° and B°, so
        # a checkpoint or a reference model between forward and backward does not invalidate it.
        parameter.data.copy_(closed)
