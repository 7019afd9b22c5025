"""GraspLoRALinear as it comes, and on each backend by name; with and without the projection.

Shapes: N out, Q basis size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.kernels.peft_providers import lora_layers, on_peft
from benchmarks.kernels.provider import Bases, Provider
from grasp_kernels.layers.linear import GraspLoRALinear
from grasp_kernels.layers.replacement import replace_lora_layers
from grasp_kernels.ops.lora_linear import registry


def _unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend == "auto":  # which of them computes is decided for each shape
        return None
    reason = registry.backends(device)[backend]
    if reason is None and backend in registry.KERNELS and device.type == "cpu":
        return "kernels that run in an interpreter on a CPU are not timed"
    if reason is None and not registry.computes(backend, dtype):
        return f"it does not compute {str(dtype).removeprefix('torch.')}"
    return reason


def _replaced(
    backend: str, project: bool, frozen_A: bool = False
) -> Callable[[nn.Module, Bases], nn.Module]:
    def adapt(module: nn.Module, bases: Bases) -> nn.Module:
        replace_lora_layers(module, backend=backend)
        for name, layer in lora_layers(module).items():
            assert isinstance(layer, GraspLoRALinear)
            if project and name in bases:
                layer.set_projection(bases[name], "residual", True, backend)
            if frozen_A:
                layer.lora_A["default"].weight.requires_grad_(False)
        return module

    return adapt


def _three(label: str, backend: str, what: str, by_default: bool) -> dict[str, Provider]:
    """Without a subspace, with one, and that with A frozen."""
    variants = (
        ("", ", no subspace", False, False),
        ("-projected", ", writers projected", True, False),
        ("-frozen-A-projected", ", writers projected, A frozen", True, True),
    )
    return {
        label + suffix: on_peft(
            what + how,
            _replaced(backend, project, frozen_A=frozen_A),
            projects=project,
            frozen_A=frozen_A,
            unavailable=partial(_unavailable, backend),
            backend=backend,
            by_default=by_default,
        )
        for suffix, how, project, frozen_A in variants
    }


def our_providers() -> dict[str, Provider]:
    """Three for each backend but the last, the specification, which nobody should time."""
    found = _three("grasp", "auto", "GraspLoRALinear as it comes", True)
    for backend in registry.BACKENDS[:-1]:
        found |= _three(f"grasp-{backend}", backend, f"GraspLoRALinear on {backend}", False)
    return found
