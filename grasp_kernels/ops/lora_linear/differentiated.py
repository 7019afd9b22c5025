"""The operator with its derivative: registered with torch, and past its dispatcher.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.ops.autocast import without_autocast
from grasp_kernels.ops.gated import Gate
from grasp_kernels.ops.gated import flat as _flat
from grasp_kernels.ops.lora_linear import aten
from grasp_kernels.ops.lora_linear.operands import Needs, Operands, Saved
from grasp_kernels.ops.lora_linear.registry import select

# Registered with Library.define and impl instead of torch.library.custom_op: the same interface at
# half its cost per call (torch 2.13 on a CPU, 64×64 layer, forward: 136 µs against 291 µs).
_LIBRARY = torch.library.Library("grasp_kernels", "FRAGMENT")
_N_TENSORS = 7  # of Operands: weight to dropout_seed
N_DIFFERENTIATED = 5  # the first of them: weight to lora_bias
_WEIGHT, _LORA_A = 2, 4  # their places among the inputs, behind x and base
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
_TWICE = "lora_linear cannot be differentiated twice; restore the stock layers with remove_grasp."
operator = torch.ops.grasp_kernels.lora_linear.default
_backward = torch.ops.grasp_kernels.lora_linear_backward.default


def _unflattened(y: Tensor, x: Tensor) -> Tensor:
    """Return `Y[T, N]` as `Y[..., N]`, in the shape of `X[..., K]`."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _run_forward(x: Tensor, base: Tensor | None, *operands: Any) -> tuple[Tensor, ...]:
    """Return `Y`, `S`, `A`, `B°`."""
    *fields, backend = operands
    op, flat = Operands(*fields), _flat(x)
    flat_base = None if base is None else _flat(base)
    y, (S, A, B) = without_autocast(select(backend, flat, op).forward, flat, op, flat_base)
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
    flat, saved = _flat(x), Saved(S, A, B)
    backward = select(backend, flat, op).backward
    found = without_autocast(backward, _flat(dy), flat, saved, op, Needs(*needs))
    found = found._replace(
        x=None if found.x is None else found.x.view(x.shape),
        base=None if found.base is None else found.base.view(dy.shape),
    )
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


def _keep(ctx: Any, wanted: bool, x: Tensor, source: Gate | None, *others: Tensor | None) -> None:
    """Save X for dW and dA alone: with a frozen A, S is the only activation kept.

    Of a product the parts are saved, which others keep anyway.
    """
    kept, gate, ctx.activation = (x if wanted else None), None, ""
    if wanted and source is not None:
        gate, kept, ctx.activation = source
    ctx.save_for_backward(kept, gate, *others)


def _kept(ctx: Any, x: Tensor | None, gate: Tensor | None, dy: Tensor, A: Tensor) -> Tensor:
    """Return X from the first two of the saved tensors, or its like of one element in memory."""
    if x is None:
        return dy.new_empty(()).expand(*dy.shape[:-1], A.shape[1])
    return x if gate is None else Gate(gate, x, ctx.activation).product().to(dy.dtype)


def _wants_x(ctx: Any) -> bool:
    return bool(ctx.needs_input_grad[_LORA_A] or ctx.needs_input_grad[_WEIGHT])


def _needs(ctx: Any, op: Operands) -> Needs:
    """Return the flags of the needed gradients."""
    of_x, of_base, *of_others = ctx.needs_input_grad[: 2 + N_DIFFERENTIATED]
    of_base = of_base and op.residual and op.write_basis is not None
    return Needs._make((of_x, *of_others, of_base))


def _with_base(
    ctx: Any, dy: Tensor, x: Tensor, found: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of Needs in the order of the inputs; unprojected, dbase is dY."""
    dx, *others, dbase = found
    dx = dx if dx is None or x.dim() == 2 else dx.view(x.shape)
    if dbase is not None:
        dbase = dbase.view(dy.shape)
    elif ctx.needs_input_grad[1]:
        dbase = dy
    return dx, dbase, *others


def _through_operator(
    needs: Needs, dy: Tensor, x: Tensor, S: Tensor, A: Tensor, B: Tensor, op: Operands, backend: str
) -> list[Tensor | None]:
    """Run the backward as an operator, visible to dispatch modes and tensor subclasses."""
    inputs = (dy, x, S, A, B, list(needs), *op, backend)
    if torch.is_grad_enabled():  # create_graph=True: keep the node that refuses a second time
        found = _backward(*inputs)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            found = _backward(*inputs)
    return [g if need else None for g, need in zip(found, needs, strict=True)]


class Plain(torch.autograd.Function):
    """Compute the operator past torch's dispatcher.

    The dispatcher takes 50 µs (forward) and 80 µs (backward) to pass the arguments, as much as the
    library calls of a small layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, *given: Any) -> Tensor:
        """Return `Y[..., N]`.

        `given` are the differentiated operands, all operands, a backend, and X as a product.
        """
        op, backend, source = given[N_DIFFERENTIATED:]
        flat = _flat(x)
        # The compiler of torch traces `aten` alone, and no import.
        module = aten if backend == "aten" else select(backend, flat, op)
        if op.dropout_p > 0.0:
            op = op._replace(dropout_seed=module.draw_seed(x))
        flat_base = None if base is None else _flat(base)
        y, saved = without_autocast(module.forward, flat, op, flat_base)
        ctx.call = module.backward, op, backend
        # The weight and the basis are saved so that a change in place is noticed.
        _keep(ctx, _wants_x(ctx), x, source, *saved, op.weight, op.write_basis)
        return y if x.dim() == 2 else _unflattened(y, x)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (run, op, backend) = outputs, ctx.call
        kept, gate, S, A, B, *_ = ctx.saved_tensors
        needs = _needs(ctx, op)
        x = _kept(ctx, kept, gate, dy, A)
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            found = _through_operator(needs, dy, x, S, A, B, op, backend)
        else:
            found = without_autocast(run, _flat(dy), _flat(x), Saved(S, A, B), op, needs)
        return *_with_base(ctx, dy, x, found), None, None, None


class Planned(torch.autograd.Function):
    """Compute a checked call over a frozen base by library calls: `Plain` with half of its inputs.

    The inputs of a function take a tenth of the time of a short call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        lora_bias: Any,
        op: Operands,
        source: Gate | None,
    ) -> Tensor:
        """Return `Y[..., N]` from `X[..., K]`, and X as a product if it is one."""
        if op.dropout_p > 0.0:
            op = op._replace(dropout_seed=aten.draw_seed(x))
        y, saved = without_autocast(aten.forward, _flat(x), op)
        ctx.op = op
        _keep(ctx, lora_A.requires_grad, x, source, *saved, op.weight, op.write_basis)
        return y if x.dim() == 2 else _unflattened(y, x)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), op = outputs, ctx.op
        kept, gate, S, A, B, *_ = ctx.saved_tensors
        x = _kept(ctx, kept, gate, dy, A)
        of_x, of_A, of_B, of_b, *_ = ctx.needs_input_grad
        needs = Needs(of_x, False, False, of_A, of_B, of_b, False)
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            if kept is None and of_x:
                raise RuntimeError(_TWICE)  # nothing would lead from the gradients back to X
            found = _through_operator(needs, dy, x, S, A, B, op, "aten")
        else:
            found = without_autocast(aten.backward, _flat(dy), _flat(x), Saved(S, A, B), op, needs)
        dx, _, _, dA, dB, db, _ = found
        return dx if dx is None or x.dim() == 2 else dx.view(x.shape), dA, dB, db, None, None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, *operands: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            y, *saved = operator(x, base, *operands)
        ctx.options = operands[_N_TENSORS:]
        _keep(ctx, _wants_x(ctx), x, None, *saved, *operands[:_N_TENSORS])
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return y, *saved

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy, *_), n_others = outputs, _N_TENSORS - N_DIFFERENTIATED + len(ctx.options)
        if dy is None:
            return (None,) * (2 + N_DIFFERENTIATED + n_others)
        kept, gate, S, A, B, *tensors = ctx.saved_tensors
        *options, backend = ctx.options
        op = Operands(*tensors, *options)
        x = _kept(ctx, kept, gate, dy, A)
        found = _through_operator(_needs(ctx, op), dy, x, S, A, B, op, backend)
        return *_with_base(ctx, dy, x, found), *(None,) * n_others


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(_TWICE)


for _name, _run, _fake, _autograd in (
    ("lora_linear", _run_forward, _fake_forward, _LoraLinear.apply),
    ("lora_linear_backward", _run_backward, _fake_backward, _OnceDifferentiable.apply),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"grasp_kernels::{_name}", _fake)
