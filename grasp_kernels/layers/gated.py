"""The gated MLP of a decoder block, `down(act(gate(x)) ⊙ up(x))`, which keeps no product.

The product is computed again in the backward of `down`, see `ops/gated.py`. The class is found by
the code of its forward, which more than a hundred models of transformers share.
Shapes: D residual width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from transformers import activations

from grasp_kernels.layers.closed import unpickled
from grasp_kernels.layers.plan import plan_class
from grasp_kernels.layers.projected import ProjectedLoRA, has_hooks
from grasp_kernels.ops.gated import Gate, Gated, kernels_for
from grasp_kernels.ops.lora_linear.differentiated import are_plain
from grasp_kernels.ops.projection import is_transforming

_ACTIVATIONS = {
    nn.SiLU: "silu",
    type(activations.ACT2FN["silu"]): "silu",
    type(activations.ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
}
# A smaller product is kept: it is 128 KiB in bfloat16, and a launch takes longer than a pass.
_LEAST_ELEMENTS = 1 << 16
_MLP: Any = nn.Module  # a mixin, as in closed.py
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks",
    "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip


class GatedMLP(_MLP):
    """Compute the forward of an MLP of transformers: `class Ours(GatedMLP, TheirMLP)`.

    `x[..., D]` gives `y[..., D]`. Where anything is between the product and `down_proj` (hooks), in
    compiled or transformed code, and for few tokens the product is kept as in theirs.
    """

    stock: type
    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return `y[..., D]`."""
        down, act = self.down_proj, self.act_fn
        if not (_is_direct(self.stock, down, act) and _is_long(x, down)):
            return super().forward(x)  # type: ignore[no-any-return]
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not _are_parts(gate, up):
            return down(act(gate) * up)  # type: ignore[no-any-return]
        source = Gate(gate, up, _ACTIVATIONS[type(act)])
        # Kernels are launched from Python; C++ has the library calls alone.
        product = Gated.apply(*source) if kernels_for(source) else plan_class().gated(source)
        y: Tensor = down.forward(product, source=source)
        return y

    def release(self) -> None:
        """Turn this module back into that of transformers in place."""
        self.__class__ = self.stock

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return unpickled, (_gated, self.stock), self.__dict__


def adopt_gated(model: nn.Module) -> list[str]:
    """Turn the gated MLPs with our layers into this class in place, and return their names."""
    found = []
    for name, module in model.named_modules():
        if _is_gated(module):
            module.__class__ = _gated(module.__class__)
            found.append(name)
    return found


def _formula(self: Any, x: Tensor) -> Any:
    """Compute the MLP in the very words of transformers."""
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _has_formula(kind: type) -> bool:
    """Say whether the forward of a class is `_formula`, by its code; libraries replace forwards."""
    code, ours = getattr(kind.forward, "__code__", None), _formula.__code__  # type: ignore[attr-defined]
    return code is not None and (code.co_code, code.co_names) == (ours.co_code, ours.co_names)


def _is_gated(module: nn.Module) -> bool:
    """Say whether a module computes the formula, with `down_proj` on our layer."""
    return (
        _has_formula(type(module))
        and "forward" not in module.__dict__
        and type(module.act_fn) in _ACTIVATIONS
        and isinstance(module.down_proj, ProjectedLoRA)
    )


def _is_direct(stock: type, down: nn.Module, act: nn.Module) -> bool:
    """Say whether the formula holds, with nothing between the product and our layer."""
    return not (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or not _has_formula(stock)
        or not isinstance(down, ProjectedLoRA)
        or type(act) not in _ACTIVATIONS
        or is_transforming()
        or has_hooks(down)
        or has_hooks(act)
        or any(getattr(all_modules, hooks) for hooks in _GLOBAL_HOOKS)
    )


def _is_long(x: Tensor, down: Any) -> bool:
    """Say whether the product of `x[..., D]` is worth a launch."""
    return bool(x.shape[:-1].numel() * down.in_features >= _LEAST_ELEMENTS)


def _are_parts(gate: Tensor, up: Tensor) -> bool:
    return (
        gate.requires_grad
        and up.requires_grad
        and gate.dtype == up.dtype
        and gate.shape == up.shape
        and are_plain(gate, up)
    )


@cache
def _gated(stock: type) -> type[GatedMLP]:
    made = type(f"Grasp{stock.__name__}", (GatedMLP, stock), {"stock": stock})
    made.__name__ = stock.__name__
    return made
