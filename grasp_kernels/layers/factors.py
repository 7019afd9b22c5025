"""A° and B° of all adapters of a model, made in one launch a forward pass.

An optimizer may change parameters without telling torch (8-bit optimizers and fused kernels write
through raw pointers), so a version counter alone cannot say when closed factors are stale. Here
factors serve one forward pass: a layer that comes a second time outside of a backward has begun a
new pass, and all layers get new factors in one launch. Inside a backward, where activation
checkpointing computes layers again, parameters cannot have changed, and the old factors serve.
Under FSDP a launch is for the layers of one unit, whose parameters are gathered together.
Shapes: K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grasp_kernels.ops.closure.api import Factor, close
from grasp_kernels.processes import is_slice

if TYPE_CHECKING:
    from grasp_kernels.layers.projected import ProjectedLoRA

Pair = tuple[Tensor, Tensor]


@dataclass
class _Entry:
    adapter: str
    dtype: torch.dtype
    key: tuple[Any, ...] = ()
    factors: Pair | None = None
    unused: bool = False  # made for the pass that is under way


class ClosedFactors:
    """Shared by the layers of one model; a layer joins with its first call."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[ProjectedLoRA, _Entry] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> ClosedFactors:
        return memo.setdefault(id(self), ClosedFactors())

    def __reduce__(self) -> tuple[type[ClosedFactors], tuple[()]]:
        return ClosedFactors, ()

    def of(self, layer: ProjectedLoRA, adapter: str, dtype: torch.dtype) -> Pair:
        """`A°[R, K]`, `B°[N, R]` of a layer in `dtype`, for one forward through it."""
        entry = self._entries.get(layer)
        if entry is None or (entry.adapter, entry.dtype) != (adapter, dtype):
            old = () if entry is None else entry.key
            entry = self._entries[layer] = _Entry(adapter, dtype, old)
        in_backward = torch._C._current_graph_task_id() != -1
        if entry.factors is None or entry.key != _key(layer, adapter):
            first = entry.factors is None
            self._refresh([layer] if first or in_backward else self._at_hand(layer))
        elif not entry.unused and not in_backward:
            self._refresh(self._at_hand(layer))
        if not in_backward:
            entry.unused = False
        assert entry.factors is not None
        return entry.factors

    def _at_hand(self, layer: ProjectedLoRA) -> list[ProjectedLoRA]:
        """The layers whose factors can be read: those outside of the unit that FSDP has gathered
        for this layer have DTensors, slices or views of freed memory."""
        return [
            other
            for other, entry in self._entries.items()
            if other is layer or _is_parameter(other, entry.adapter)
        ]

    @torch.inference_mode(False)  # factors made in an evaluation may serve a training step
    @torch.no_grad()
    def _refresh(self, layers: list[ProjectedLoRA]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[ProjectedLoRA]] = {}
        for layer in layers:
            entry = self._entries[layer]
            if entry.adapter not in layer.lora_A:  # the adapter was deleted since
                del self._entries[layer]
                continue
            where = layer.lora_A[entry.adapter].weight.device
            groups.setdefault((where, entry.dtype), []).append(layer)
        for (_, dtype), group in groups.items():
            factors = [f for layer in group for f in _factors(layer, self._entries[layer])]
            closed = iter(close(factors, dtype, backend="auto"))
            for layer in group:
                entry = self._entries[layer]
                entry.factors = next(closed), next(closed).mT
                key = _key(layer, entry.adapter)
                if entry.key and key != entry.key and layer.padded_weight is not None:
                    # What an earlier forward saved is gone: let its backward say so.
                    torch.autograd.graph.increment_version(layer.padded_weight)
                entry.key = key
                entry.unused = True


def _is_parameter(layer: ProjectedLoRA, adapter: str) -> bool:
    """Whether the factors are parameters as they are everywhere but in FSDP's hands."""
    if adapter not in layer.lora_A:
        return True  # deleted, and so will be its entry
    pair = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return all(type(factor) is nn.Parameter and not is_slice(factor) for factor in pair)


def _factors(layer: ProjectedLoRA, entry: _Entry) -> tuple[Factor, Factor]:
    adapter = entry.adapter
    closed = adapter in layer.closed_adapters
    A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    held = layer.padded_parts(adapter, entry.dtype)
    return (
        Factor(A, layer.read_basis if closed else None, held and held.closed_A),
        Factor(B.mT, layer.write_basis if closed else None, held and held.closed_B.mT),
    )


def _key(layer: ProjectedLoRA, adapter: str) -> tuple[Any, ...]:
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    bases = (id(layer.read_basis), id(layer.write_basis), adapter in layer.closed_adapters)
    return A.data_ptr(), version(A), B.data_ptr(), version(B), *bases


def version(tensor: Tensor) -> int | None:
    """torch's count of in-place changes; tensors made in inference mode have none."""
    return None if tensor.is_inference() else tensor._version
