"""A call of a layer that has passed every check, for as long as all that was checked stays.

A layer tries its plan at every call. The plan compares all that the checks of `why_stock` and
`lora_linear` have read. If it is the same, the plan computes the call by library calls, as the
backend `aten`. So nothing has to tell a plan of a change. `Plan` of `csrc/call` and `PythonPlan`
have the same guards and give the same bits; the second is for an installation without a compiler.
Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from grasp_kernels import cpu
from grasp_kernels.ops.autocast import autocast_dtype
from grasp_kernels.ops.gated import Gate, Gated
from grasp_kernels.ops.lora_linear import registry
from grasp_kernels.ops.lora_linear.differentiated import Planned
from grasp_kernels.ops.lora_linear.operands import Operands

# What peft and we keep in a layer, as far as a call depends on it.
_OF_LAYER = (
    "_modules", "_disable_adapters", "merged_adapters", "scaling", "lora_variant", "write_basis",
    "closed_adapters", "new_adapters", "project", "backend",
)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_UNLIMITED = 2**31 - 1
_FOLDER = Path(__file__).parent.parent
Plan = Any  # `PythonPlan`, or the class of the same methods in `csrc/call`


class Guards(NamedTuple):
    """Hold what a call was checked for.

    Attributes:
        same: a dictionary, or None for the attributes of the layer; a key; its value by identity,
            or None for a key that is not there.
        empty: containers that are empty.
        kinds: modules with their classes.
        adapter: the name of the one active adapter.
        most_tokens: T of the longest call that library calls compute.
        bf16: whether products in bfloat16 are fast on this CPU.
    """

    same: list[tuple[dict[str, Any] | None, str, Any]]
    empty: list[Any]
    kinds: list[tuple[nn.Module, type]]
    adapter: str
    most_tokens: int
    bf16: bool


class PythonPlan:
    """Compute the calls of one layer while its guards hold.

    Args:
        tensors: `W`, `bias`, `A`, `B`, `b`, `V`; None where there is none.
        options: scaling, dropout_p, residual, closed.
        transposed: whether `W` is stored as `[K, N]`.
        guards: what the call was checked for.
    """

    def __init__(
        self,
        tensors: tuple[Tensor | None, ...],
        options: tuple[float, float, bool, bool],
        transposed: bool,
        guards: Guards,
    ) -> None:
        self.op = op = Operands._make((*tensors, None, *options, False))
        assert op.weight is not None
        self.weight, self.transposed, self.guards = op.weight, transposed, guards
        wide = torch.promote_types(op.weight.dtype, op.lora_A.dtype) != op.weight.dtype
        self.exact = op._replace(exact=wide)  # outside of autocast, wherever the plan was made
        self.frozen = [t for t in (op.weight, op.bias) if t is not None]
        self.forms = [(t, t.shape, t.dtype) for t in tensors if t is not None]
        self.device = op.weight.device
        self.active = (guards.adapter, [guards.adapter])
        self.features = op.lora_A.shape[1]

    def run(self, layer: nn.Module, x: Tensor, source: Gate | None) -> Tensor | None:
        """Return `Y[..., N]` from `X[..., K]`, or None where a guard does not hold.

        `source` is X as a product, if it is one.
        """
        # First of all: to look at a shape is an operation where one is recorded.
        if torch._C._get_tracing_state() is not None or type(x) not in (Tensor, nn.Parameter):
            return None
        if not self._holds(layer.__dict__, x):
            return None
        op, weight, dtype = self.exact, self.weight, autocast_dtype(self.device)
        if dtype is not None and x.dtype != torch.float64:
            x, weight, bias = x.to(dtype), weight.to(dtype), op.bias
            op = self.op._replace(weight=weight, bias=None if bias is None else bias.to(dtype))
        elif x.dtype != weight.dtype or dtype is not None:
            return None
        if self.transposed:
            op = op._replace(weight=weight.mT)
        return Planned.apply(x, op.lora_A, op.lora_B, op.lora_bias, op, source)

    def _holds(self, attributes: dict[str, Any], x: Tensor) -> bool:
        same, empty, kinds, _, most_tokens, _ = self.guards
        for owner, key, value in same:
            if (attributes if owner is None else owner).get(key) is not value:
                return False
        for container in empty:
            if container:
                return False
        for module, kind in kinds:
            if type(module) is not kind:
                return False
        device, features = self.device, self.features
        for tensor, shape, dtype in self.forms:
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
                return False
        for tensor in self.frozen:
            if tensor.requires_grad:
                return False
        return (
            attributes["_active_adapter"] in self.active
            and x.device == device
            and x.layout == torch.strided
            and not x.is_meta
            and x.shape[-1:] == (features,)
            and x.numel() <= most_tokens * features
            and torch._C._len_torch_dispatch_stack() == 0
            and not torch._C._are_functorch_transforms_active()
        )

    @staticmethod
    def gated(source: Gate) -> Tensor:
        """Return `X[..., K]` with its derivative."""
        return Gated.apply(*source)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # a copy of a layer gets None in place of its plan


def make_plan(layer: Any, x: Tensor, adapter: str) -> Plan | None:
    """Return a plan for calls like that of a checked layer with `X[..., K]`, or None.

    There is none for what is rare: a trained base, weights that are no parameters of their modules,
    and an input of a subclass. Calls that kernels compute have none either.
    """
    base, lora_A, lora_B = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    factors = (base, lora_A, lora_B)
    frozen = not any(p is not None and p.requires_grad for p in (base.weight, base.bias))
    # FSDP1 puts views beside the parameters, functional calls put tensors in their place.
    own = all(type(module._parameters.get("weight")) is nn.Parameter for module in factors)
    own = own and not any("weight" in module.__dict__ for module in factors)
    if (
        type(x) not in (Tensor, nn.Parameter)
        or not (frozen and own)
        or layer.backend not in ("auto", "aten")
    ):
        return None
    most_tokens = _UNLIMITED
    if layer.backend == "auto" and registry.measured_on(x.device):
        most_tokens = registry.least_tokens(layer.out_features, layer.in_features) - 1
    if x.numel() > most_tokens * layer.in_features:
        return None
    dropout = layer.lora_dropout[adapter]
    drops = dropout.training and isinstance(dropout, nn.Dropout)
    tensors = (base.weight, base.bias, lora_A.weight, lora_B.weight, lora_B.bias, layer.write_basis)
    s, p = float(layer.scaling[adapter]), float(dropout.p) if drops else 0.0
    options = s, p, layer.project == "residual", adapter in layer.closed_adapters
    guards = Guards(
        list(_same(layer, adapter, dropout, factors)),
        [layer.merged_adapters, *(getattr(one, hooks) for one in factors for hooks in _HOOKS)],
        [(module, type(module)) for module in (*factors, dropout)],
        adapter,
        most_tokens,
        cpu.multiplies(torch.bfloat16),
    )
    return plan_class()(tensors, options, layer.fan_in_fan_out, guards)


def plan_class() -> Any:
    """Return the class of plans that this installation has."""
    found = compiled()
    return PythonPlan if isinstance(found, str) else found


def _same(
    layer: Any, adapter: str, dropout: nn.Module, factors: tuple[nn.Module, ...]
) -> Iterator[tuple[dict[str, Any] | None, str, Any]]:
    """Yield what must be the same objects, as `Guards.same`."""
    yield from ((None, key, layer.__dict__.get(key)) for key in _OF_LAYER)
    groups = ("lora_A", "lora_B", "lora_dropout")
    yield from ((layer._modules, name, layer._modules[name]) for name in ("base_layer", *groups))
    for group in groups:
        modules = layer._modules[group]._modules
        yield layer._modules[group].__dict__, "_modules", modules
        yield modules, adapter, modules[adapter]
    for module in factors:
        for leaf in ("weight", "bias"):
            yield module._parameters, leaf, module._parameters[leaf]
        for name in ("weight", "bias", "forward", "_hf_hook", "_parameters", *_HOOKS):
            yield module.__dict__, name, module.__dict__.get(name)
    yield from ((dropout.__dict__, key, dropout.__dict__.get(key)) for key in ("training", "p"))
    yield layer.scaling, adapter, layer.scaling[adapter]
    yield layer.lora_variant, adapter, None
    yield forward_ad.__dict__, "_current_level", forward_ad._current_level
    yield torch.compiler.__dict__, "_is_exporting_flag", False


@cache
def compiled() -> Any:
    """Return the class of plans in C++, or the reason why there is none."""
    release = "_".join(torch.__version__.split(".")[:2])
    try:
        return importlib.import_module(f"grasp_kernels._call_{release}").Plan
    except ImportError as error:
        built = {file.name.split(".")[0].removeprefix("_call_") for file in _FOLDER.glob("_call_*")}
        if not built:
            return "not built"
        why = f"but {error}" if release in built else f"and torch is {torch.__version__}"
        return f"built for torch {', '.join(sorted(built)).replace('_', '.')}, {why}"
