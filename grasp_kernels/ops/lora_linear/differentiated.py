"""The operator with its derivative: registered with torch, and past its dispatcher.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.ops.autocast import without_autocast
from grasp_kernels.ops.lora_linear.operands import Gradients, Needs, Operands, Saved
from grasp_kernels.ops.lora_linear.registry import select

# Registered with Library.define and impl instead of torch.library.custom_op: the same interface at
# half its cost per call (torch 2.13 on a CPU, 64×64 layer, forward: 136 µs against 291 µs).
_LIBRARY = torch.library.Library("grasp_kernels", "FRAGMENT")
_N_TENSORS = 7  # of Operands: weight to dropout_seed
N_DIFFERENTIATED = 5  # the first of them: weight to lora_bias
_WEIGHT, _LORA_A = 0, 2  # their places among them
_OPERANDS = (
    "Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? lora_bias, "
    "Tensor? write_basis, Tensor? dropout_seed, "
    "float scaling, float dropout_p, bool residual, bool closed, bool exact, str backend"
)
_LIBRARY.define(
    f"lora_linear(Tensor x, Tensor? base, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor S, Tensor A, Tensor B, bool[] needs, "
    f"{_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
operator = torch.ops.grasp_kernels.lora_linear.default
_backward = torch.ops.grasp_kernels.lora_linear_backward.default


def _computed(
    module: ModuleType, x: Tensor, base: Tensor | None, op: Operands
) -> tuple[Tensor, Saved]:
    """Return `Y[T, N]` from `X[T, K]`, and the tensors for the backward."""
    flat = None if base is None else _flat(base)
    return without_autocast(module.forward, x, op, flat)


def _differentiated(
    module: ModuleType, dy: Tensor, x: Tensor, saved: Saved, op: Operands, needs: Needs
) -> Gradients:
    """Return the gradients in the shapes of their operands; None where not needed."""
    found = without_autocast(module.backward, _flat(dy), _flat(x), saved, op, needs)
    dx, dbase = found.x, found.base
    return found._replace(
        x=None if dx is None else dx.view(x.shape),
        base=None if dbase is None else dbase.view(dy.shape),
    )


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unflattened(y: Tensor, x: Tensor) -> Tensor:
    """Return `Y[T, N]` as `Y[..., N]`, in the shape of `X[..., K]`."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _run_forward(x: Tensor, base: Tensor | None, *operands: Any) -> tuple[Tensor, ...]:
    """Return `Y`, `S`, `A`, `B°`."""
    *fields, backend = operands
    op, flat = Operands(*fields), _flat(x)
    y, (S, A, B) = _computed(select(backend, flat, op), flat, base, op)
    # An operator must not return its own inputs.
    A, B = (_apart(f, own) for f, own in ((A, op.lora_A), (B, op.lora_B)))
    return _unflattened(y, x), S, A, B


def _apart(found: Tensor, own: Tensor) -> Tensor:
    shared = torch._C._is_alias_of(found, own)  # type: ignore[attr-defined]
    return found.clone() if shared else found


def _run_backward(
    dy: Tensor, x: Tensor, S: Tensor, A: Tensor, B: Tensor, needs: list[bool], *operands: Any
) -> tuple[Tensor, ...]:
    """Return the gradients in the order of Needs; empty where not needed."""
    *fields, backend = operands
    op = Operands(*fields)
    module = select(backend, _flat(x), op)
    found = _differentiated(module, dy, x, Saved(S, A, B), op, Needs(*needs))
    return tuple(x.new_empty(0) if g is None else g for g in found)


def _fake_forward(
    x: Tensor, base: Any, weight: Any, bias: Any, lora_A: Tensor, lora_B: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    (*leading, K), (N, R) = x.shape, lora_B.shape
    dtype = Operands(weight, bias, lora_A, lora_B, *others[:-1]).adapter_dtype(x)
    y, S = x.new_empty(*leading, N), x.new_empty(R, math.prod(leading), dtype=dtype)
    return y, S, x.new_empty(R, K, dtype=dtype), x.new_empty(N, R, dtype=dtype)


def _fake_backward(
    dy: Tensor, x: Tensor, S: Tensor, A: Tensor, B: Tensor, needs: list[bool], *operands: Any
) -> tuple[Tensor, ...]:
    return tuple(
        tensor.new_empty(tensor.shape) if needed else x.new_empty(0)
        for tensor, needed in zip((x, *operands[:5], dy), needs, strict=True)
    )


def are_plain(*given: Tensor | None) -> bool:
    """Say whether tensors hold data, outside of dispatch modes and tensor subclasses."""
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        tensor is None or (type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta)
        for tensor in given
    )


def _stand_in(dy: Tensor, lora_A: Tensor) -> Tensor:
    """Return a tensor like `X[..., K]` in shape, dtype and device, of one element in memory."""
    return dy.new_empty(()).expand(*dy.shape[:-1], lora_A.shape[1])


def _keep(ctx: Any, x: Tensor, saved: Sequence[Tensor], operands: Sequence[Any]) -> None:
    """Save X for dW and dA alone: with a frozen A, S is the only activation kept."""
    needs = ctx.needs_input_grad[2:]  # behind x and base
    kept = x if needs[_WEIGHT] or needs[_LORA_A] else None
    ctx.save_for_backward(kept, *saved, *operands[:_N_TENSORS])
    ctx.options = operands[_N_TENSORS:]


def _kept(ctx: Any, dy: Tensor) -> tuple[Tensor, Saved, Operands, Needs]:
    """Return `X`, the saved tensors, the operands, and the flags of the needed gradients."""
    x, S, A, B, *tensors = ctx.saved_tensors
    op = Operands(*tensors, *ctx.options)
    of_x, of_base, *of_others = ctx.needs_input_grad[: 2 + N_DIFFERENTIATED]
    projects = op.residual and op.write_basis is not None
    needs = Needs._make((of_x, *of_others, of_base and projects))
    return _stand_in(dy, op.lora_A) if x is None else x, Saved(S, A, B), op, needs


def _with_base(ctx: Any, dy: Tensor, found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradients of Needs in the order of the inputs; unprojected, dbase is dY."""
    dx, *others, dbase = found
    return dx, dy if ctx.needs_input_grad[1] and dbase is None else dbase, *others


def _through_operator(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Run the backward as an operator, visible to dispatch modes and tensor subclasses."""
    x, saved, op, needs = _kept(ctx, dy)
    inputs = (dy, x, *saved, list(needs), *op, ctx.backend)
    if torch.is_grad_enabled():  # create_graph=True: keep the node that refuses a second time
        found = _backward(*inputs)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            found = _backward(*inputs)
    return _with_base(ctx, dy, [g if need else None for g, need in zip(found, needs, strict=True)])


class Plain(torch.autograd.Function):
    """Compute the operator past torch's dispatcher.

    The dispatcher takes 50 µs (forward) and 80 µs (backward) to pass the arguments, as much as the
    library calls of a small layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, *given: Any) -> Tensor:
        *differentiated, others, options, ctx.backend = given
        op, flat = Operands._make((*differentiated, *others, None, *options)), _flat(x)
        ctx.module = module = select(ctx.backend, flat, op)
        if op.dropout_p > 0.0:
            op = op._replace(dropout_seed=module.draw_seed(x))
        y, saved = _computed(module, flat, base, op)
        _keep(ctx, x, saved, op)
        return _unflattened(y, x)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = outputs
        if torch.is_grad_enabled():
            return *_through_operator(ctx, dy), None, None, None
        x, saved, op, needs = _kept(ctx, dy)
        found = _differentiated(ctx.module, dy, x, saved, op, needs)
        return *_with_base(ctx, dy, found), None, None, None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, *operands: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            y, *saved = operator(x, base, *operands)
        ctx.backend = operands[-1]
        _keep(ctx, x, saved, operands[:-1])
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return y, *saved

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy, *_), n_others = outputs, _N_TENSORS - N_DIFFERENTIATED + len(ctx.options) + 1
        found = (None,) * (2 + N_DIFFERENTIATED) if dy is None else _through_operator(ctx, dy)
        return *found, *(None,) * n_others


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "lora_linear cannot be differentiated twice; for gradients of gradients, restore the "
            "stock layers with remove_grasp."
        )


for _name, _run, _fake, _autograd in (
    ("lora_linear", _run_forward, _fake_forward, _LoraLinear.apply),
    ("lora_linear_backward", _run_backward, _fake_backward, _OnceDifferentiable.apply),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"grasp_kernels::{_name}", _fake)
