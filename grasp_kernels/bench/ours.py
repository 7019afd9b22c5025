"""GraspLoRALinear as it comes, and on each backend by name; with and without the projection.

Shapes: N out, Q write basis size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from grasp_kernels.bench.peft_providers import lora_layers, on_peft
from grasp_kernels.bench.provider import Bases, Provider
from grasp_kernels.layers.linear import GraspLoRALinear
from grasp_kernels.layers.replacement import replace_lora_layers
from grasp_kernels.ops.lora_linear import api

_INTERPRETED = "triton"  # the one backend that a CPU can run without being meant to


def resolve(backend: str, device: torch.device) -> str | None:
    """The backend that computes: for "auto" the first that can run."""
    if backend != "auto":
        return backend
    return next((name for name, why in api.backends(device).items() if why is None), None)


def _unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    name = resolve(backend, device)
    if name is None:
        return f"no backend runs on {device}"
    if name == _INTERPRETED and device.type == "cpu":
        return api.backends(device)[name] or "Triton's interpreter is not timed"
    return api.backends(device)[name]


def _replaced(backend: str, project: bool) -> Callable[[nn.Module, Bases], nn.Module]:
    def adapt(module: nn.Module, bases: Bases) -> nn.Module:
        replace_lora_layers(module, backend=backend)
        for name, layer in lora_layers(module).items():
            if project and name in bases and isinstance(layer, GraspLoRALinear):
                layer.set_projection(bases[name], None, "residual", True, backend)
        return module

    return adapt


def _pair(label: str, backend: str, what: str, by_default: bool) -> dict[str, Provider]:
    return {
        label + ("-projected" if project else ""): on_peft(
            what + (", writers projected" if project else ", no subspace"),
            _replaced(backend, project),
            projects=project,
            unavailable=partial(_unavailable, backend),
            backend=partial(resolve, backend),
            by_default=by_default,
        )
        for project in (False, True)
    }


def our_providers() -> dict[str, Provider]:
    """Two for each backend but the last, the specification, which nobody should time."""
    found = _pair("grasp", "auto", "GraspLoRALinear as it comes", True)
    found["grasp-default"] = on_peft(
        "GraspLoRALinear on the float32 adapter that peft makes, no subspace",
        _replaced("auto", False),
        adapters="float32",
        unavailable=_float32_adapter_unavailable,
        backend=partial(resolve, "auto"),
    )
    for backend in api.BACKENDS[:-1]:
        found |= _pair(f"grasp-{backend}", backend, f"GraspLoRALinear on {backend}", False)
    return found


def _float32_adapter_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float32:
        return "in float32 it is the provider 'grasp'"
    return _unavailable("auto", device, dtype)
