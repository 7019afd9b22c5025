"""What every closed layer does: its factors are out of the subspace in whatever leaves it.

Shapes: K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from grasp_kernels.ops.projection import project_columns, project_rows

# A factor counts as closed when its share along the basis is at rounding level; writing it again
# would change the last bit at every save.
_CLOSED_TO = 8


class ClosedLayer(nn.Module, LoraLayer):
    """A LoRA layer of peft with bases, to be mixed into one of peft's classes.

    Attributes:
        write_basis: `V[N, Q]`, float32, non-persistent buffer, or None.
        read_basis: `U[K, P]`, float32, non-persistent buffer, or None.
        closed_adapters: names of the adapters that are kept closed.
    """

    write_basis: Tensor | None
    read_basis: Tensor | None
    closed_adapters: frozenset[str]

    if TYPE_CHECKING:  # the attributes of peft's classes, which have no types

        def __getattr__(self, name: str) -> Any: ...

    def set_bases(
        self, write_basis: Tensor | None, read_basis: Tensor | None, closed: bool, where: Any
    ) -> None:
        """Set the bases on a device; the adapters that exist now are closed if `closed`."""
        for name, basis in (("write_basis", write_basis), ("read_basis", read_basis)):
            if basis is not None:
                basis = basis.detach().to(where, torch.float32)
            self.register_buffer(name, basis, persistent=False)
        self.closed_adapters = frozenset(self.lora_A) if closed else frozenset()
        self.close_()

    def drop_bases(self) -> None:
        """Close the factors for good and forget the bases."""
        self.close_()
        for name in ("write_basis", "read_basis", "closed_adapters"):
            delattr(self, name)

    @torch.no_grad()
    def close_(self) -> None:
        """Write `A°`, `B°`, `b°` into the parameters; the function of the layer stays as it is."""
        for name in self.closed_adapters & self.lora_A.keys():
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            _close_(lora_A.weight, lambda A: project_rows(A, self.read_basis))
            _close_(lora_B.weight, lambda B: project_columns(B, self.write_basis))
            if lora_B.bias is not None:
                _close_(lora_B.bias, lambda b: project_columns(b, self.write_basis))

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """peft's `ΔW`, which merging uses, of the closed factors."""
        self.close_()
        return super().get_delta_weight(adapter, *args, **kwargs)  # type: ignore[misc]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A state dict visits this layer before the factors below it, so they are stored closed;
        # closing in place (not a copy) makes the checkpoint the very state that training goes on
        # from, so that a resumed run repeats an uninterrupted one bit by bit.
        self.close_()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `model.bfloat16()` must not round the bases: closure is as exact as they are.
        bases = self.write_basis, self.read_basis
        super()._apply(fn, recurse)
        for name, basis in zip(("write_basis", "read_basis"), bases, strict=True):
            moved = getattr(self, name)
            if basis is not None and moved.dtype != torch.float32:
                setattr(self, name, basis.to(moved.device))
        return self


def _close_(parameter: Tensor, projection: Callable[[Tensor], Tensor]) -> None:
    closed = projection(parameter)
    if closed is parameter or parameter.is_meta:
        return
    removed = torch.linalg.vector_norm(closed - parameter.to(closed.dtype))
    rounding = _CLOSED_TO * torch.finfo(parameter.dtype).eps
    if removed > rounding * torch.linalg.vector_norm(closed):
        parameter.copy_(closed)
