"""The public operator: checks, registration with torch, autograd. It imports no kernel.

Shapes: T tokens, K in, N out, R LoRA rank, P read basis size, Q write basis size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.ops import dispatch
from grasp_kernels.ops.lora_linear import measured
from grasp_kernels.ops.lora_linear.dropout import device_seed
from grasp_kernels.ops.lora_linear.operands import Needs, Operands, Saved
from grasp_kernels.ops.lora_linear.padding import parts

PACKAGE = __package__  # where the backends are
KERNELS = ("cuda", "triton")
BACKENDS = (*KERNELS, "aten", "reference")  # the reference is last and runs everywhere
PROJECTIONS = ("residual", "weights")


def backends(where: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend with None if it can run on the device, else the reason why it cannot."""
    if where is None:
        where = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: dispatch.why_not(PACKAGE, name, torch.device(where)) for name in BACKENDS}


def computes(backend: str, dtype: torch.dtype) -> bool:
    """Whether a backend, if it is here, computes with activations of a dtype."""
    module = dispatch.load(PACKAGE, backend)
    return isinstance(module, str) or dtype in module.DTYPES


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    base: Tensor | None = None,
    lora_bias: Tensor | None = None,
    write_basis: Tensor | None = None,
    read_basis: Tensor | None = None,
    write_weight: Tensor | None = None,
    closed_factors: tuple[Tensor, Tensor] | None = None,
    padded_weight: Tensor | None = None,
    project: str = "residual",
    closed: bool = True,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """`Y = X Wᵀ + bias + s (X̃ A°ᵀ) B°ᵀ`, whose gradient reinforces nothing along the bases.

    Args:
        x: `X[..., K]` in the dtype of `weight` (or under autocast, which casts both).
        weight, bias: the base layer, `W[N, K]` and `[N]`; usually frozen. None with `base`.
        lora_A, lora_B: `A[R, K]`, `B[N, R]`; float32 over a bfloat16 base is fine, the
            activations are never cast up.
        scaling: the `s` of LoRA, `alpha / R` or `alpha / √R`.
        base: `[..., N]`, what the base layer made of `x`, in place of its weight: for weights that
            another library stores and multiplies (4 bits, 8 bits). `x` is cast to its dtype, and
            its gradient is `dY` as the projection leaves it, so that its layer's backward is
            projected too. It is not changed in place.
        lora_bias: `b[N]`, adds `s b°`.
        write_basis: `V[N, Q]`, float32, orthonormal columns in the residual stream.
        read_basis: `U[K, P]`, float32, orthonormal columns in the input of this layer.
        write_weight: `Vᵀ W [Q, K]`, if at hand; computed in each backward otherwise.
        closed_factors: `A°[R, K]`, `B°[N, R]` in the dtype of the activations, if at hand; they are
            constants of this call, and its gradients are those of `lora_A` and `lora_B`.
        padded_weight: the buffer of `ops.lora_linear.padding` that `weight`, `closed_factors` and
            `write_weight` are views of; lets library products carry the adapter.
        project: "residual" projects the arriving `dY` before anything uses it; "weights"
            projects the gradients of `A`, `B` alone and leaves `dX`.
        closed: compute with `A° = A (I − U Uᵀ)`, `B° = (I − V Vᵀ) B`, so that the update
            neither reads nor writes along the bases, whatever the optimizer does.
        dropout_p: on the adapter's input, drawn from torch's generator of the device.
        backend: a name in `backends()`, which then runs or raises, or "auto": what was measured to
            be fastest on this GPU for the nearest shape, `aten` where nothing was measured.

    Returns:
        `Y[..., N]` in the dtype of the activations. Gradients of gradients are refused.
    """
    if base is None:
        x, weight, bias = _autocast(x, weight, bias)
    else:
        x = x.to(base.dtype)
    tensors = (
        weight,
        bias,
        lora_A,
        lora_B,
        lora_bias,
        write_basis,
        read_basis,
        write_weight,
        *((None, None) if closed_factors is None else closed_factors),
    )
    _check(x, base, *tensors)
    if project not in PROJECTIONS:
        raise ValueError(f"project is {project!r}; use one of {PROJECTIONS}.")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; use a probability between 0 and 1.")
    tensors = (
        *tensors,
        _checked_padding(padded_weight, weight, closed_factors, write_weight),
    )
    options = float(scaling), float(dropout_p), project == "residual", closed
    if not torch.compiler.is_compiling() and _are_plain(x, base, *tensors):
        differentiated, others = tensors[:_N_DIFFERENTIATED], tensors[_N_DIFFERENTIATED:]
        return _Plain.apply(x, base, *differentiated, others, options, backend)
    seed = device_seed(x) if dropout_p > 0.0 else None
    y, *_ = _forward(x, base, *tensors, seed, *options, backend)
    return y


def _checked_padding(
    padded: Tensor | None,
    weight: Tensor | None,
    closed_factors: tuple[Tensor, Tensor] | None,
    write_weight: Tensor | None,
) -> Tensor | None:
    """The buffer, if it is that of the operands of this call."""
    if padded is None:
        return None
    if weight is None:
        raise ValueError("padded_weight holds a weight; leave it out with base.")
    (N, K), Q = weight.shape, 0 if write_weight is None else write_weight.shape[0]
    given = [weight, *(closed_factors or ())] + ([] if write_weight is None else [write_weight])
    R = closed_factors[0].shape[0] if closed_factors else 0
    E = padded.shape[0] - N
    expected = parts(padded, N, K, R, Q)
    places = (expected.weight, expected.closed_A, expected.closed_B, expected.write_weight)
    fits = closed_factors is not None and padded.shape == (N + E, K + E) and R + Q <= E
    if not fits or any(
        tensor.data_ptr() != place.data_ptr() for tensor, place in zip(given, places, strict=False)
    ):
        raise ValueError(
            f"padded_weight {tuple(padded.shape)} does not hold the weight, the closed factors and "
            "write_weight of this call; make them with padding.pad and padding.parts."
        )
    return padded


def _autocast(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What autocast does to a linear layer; the adapter and the bases keep their precision."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (weight, bias))
    return x.to(dtype), weight, bias


def _check(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    write_basis: Tensor | None,
    read_basis: Tensor | None,
    write_weight: Tensor | None,
    closed_A: Tensor | None,
    closed_B: Tensor | None,
) -> None:
    if base is not None and any(given is not None for given in (weight, bias, write_weight)):
        raise ValueError("base stands for weight, bias and write_weight; leave those out with it.")
    (N, K), R = _widths(x, weight, base), lora_A.shape[0]
    if R == 0:
        raise ValueError("lora_A has rank 0; a LoRA layer needs a rank of at least 1.")
    Q = 0 if write_basis is None else write_basis.shape[-1]
    P = 0 if read_basis is None else read_basis.shape[-1]
    expected = {
        "base": (base, (*x.shape[:-1], N)),
        "x": (x, (*x.shape[:-1], K)),
        "bias": (bias, (N,)),
        "lora_A": (lora_A, (R, K)),
        "lora_B": (lora_B, (N, R)),
        "lora_bias": (lora_bias, (N,)),
        "write_basis": (write_basis, (N, Q)),
        "read_basis": (read_basis, (K, P)),
        "write_weight": (write_weight, (Q, K)),
        "closed_factors[0]": (closed_A, (R, K)),
        "closed_factors[1]": (closed_B, (N, R)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} "
                f"for a weight of shape {(N, K)}."
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move it there.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; the operator needs floating point.")
    computed = {
        "weight": weight,
        "bias": bias,
        "closed_factors[0]": closed_A,
        "closed_factors[1]": closed_B,
    }
    for name, tensor in computed.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} but x has {x.dtype}; "
                "cast one or use torch.autocast."
            )


def _widths(x: Tensor, weight: Tensor | None, base: Tensor | None) -> tuple[int, int]:
    """N and K."""
    given, name, form = (weight, "weight", "[N, K]") if base is None else (base, "base", "[..., N]")
    if given is None:
        raise ValueError("weight is None; pass the weight of the base layer, or base, its result.")
    if x.dim() < 1 or given.dim() != (2 if base is None else x.dim()):
        raise ValueError(
            f"x {tuple(x.shape)} and {name} {tuple(given.shape)} must be [..., K] and {form}."
        )
    return (given.shape[0], given.shape[1]) if base is None else (given.shape[-1], x.shape[-1])


# Registered with Library.define and impl instead of torch.library.custom_op: the same interface at
# half its cost per call (torch 2.13 on a CPU, 64×64 layer, forward: 136 µs against 291 µs).
_LIBRARY = torch.library.Library("grasp_kernels", "FRAGMENT")
_N_TENSORS = 12  # of Operands: weight to dropout_seed
_N_DIFFERENTIATED = 5  # the first of them: weight to lora_bias
_WEIGHT, _LORA_A, _WRITE_BASIS = 0, 2, 5  # their places among them
_RESIDUAL = 2  # its place behind them
_CLOSED_A = 4  # its place behind lora_B
_OPERANDS = (
    "Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? lora_bias, "
    "Tensor? write_basis, Tensor? read_basis, Tensor? write_weight, "
    "Tensor? closed_A, Tensor? closed_B, Tensor? padded_weight, Tensor? dropout_seed, "
    "float scaling, float dropout_p, bool residual, bool closed, str backend"
)
_LIBRARY.define(
    f"lora_linear(Tensor x, Tensor? base, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor S, Tensor A, Tensor B, bool[] needs, "
    f"{_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_forward = torch.ops.grasp_kernels.lora_linear.default
_backward = torch.ops.grasp_kernels.lora_linear_backward.default


def _computed(
    module: ModuleType, x: Tensor, base: Tensor | None, op: Operands
) -> tuple[Tensor, Saved]:
    """`Y`, and what the backward needs."""
    with _without_autocast(x):
        flat = None if base is None else base.reshape(-1, base.shape[-1])
        y, saved = module.forward(x.reshape(-1, x.shape[-1]), op, flat)
    return y.view(*x.shape[:-1], y.shape[-1]), saved


def _differentiated(
    module: ModuleType,
    dy: Tensor,
    x: Tensor,
    saved: Sequence[Tensor],
    op: Operands,
    needs: Needs,
) -> list[Tensor | None]:
    """The gradients in the order of Needs; None where not needed."""
    with _without_autocast(x):
        dx, *others, dbase = module.backward(
            dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), Saved(*saved), op, needs
        )
    return [
        None if dx is None else dx.view(x.shape),
        *others,
        None if dbase is None else dbase.view(dy.shape),
    ]


def _run_forward(x: Tensor, base: Tensor | None, *operands: Any) -> tuple[Tensor, ...]:
    """`Y`, `S`, `A°`, `B°`, the last two empty if they were given."""
    *fields, backend = operands
    op = Operands(*fields)
    y, (S, A, B) = _computed(_select(backend, x, op), x, base, op)
    # An operator must not return its own inputs.
    if op.closed_A is not None:
        A, B = x.new_empty(0), x.new_empty(0)
    A, B = (_apart(f, own) for f, own in ((A, op.lora_A), (B, op.lora_B)))
    return y, S, A, B


def _apart(found: Tensor, own: Tensor) -> Tensor:
    shared = torch._C._is_alias_of(found, own)  # type: ignore[attr-defined]
    return found.clone() if shared else found


def _run_backward(
    dy: Tensor, x: Tensor, S: Tensor, A: Tensor, B: Tensor, needs: list[bool], *operands: Any
) -> tuple[Tensor, ...]:
    """The gradients in the order of Needs; empty where not needed."""
    *fields, backend = operands
    op = Operands(*fields)
    if op.closed_A is not None and op.closed_B is not None:
        A, B = op.closed_A, op.closed_B
    module = _select(backend, x, op)
    found = _differentiated(module, dy, x, (S, A, B), op, Needs(*needs))
    return tuple(x.new_empty(0) if g is None else g for g in found)


def _select(backend: str, x: Tensor, op: Operands) -> ModuleType:
    """The backend for `x[..., K]`; forward and backward see the same shapes and so agree."""
    x = x.reshape(-1, x.shape[-1])
    if backend == "auto":
        order: Sequence[str] = measured.order(x, op)
    else:
        order = BACKENDS
    return dispatch.select(PACKAGE, order, backend, x.device, x, op)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside the operator every dtype is chosen by hand."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _fake_forward(
    x: Tensor, base: Any, weight: Any, bias: Any, lora_A: Tensor, lora_B: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    (*leading, K), (N, R) = x.shape, lora_B.shape
    y, S = x.new_empty(*leading, N), x.new_empty(R, math.prod(leading))
    if others[_CLOSED_A] is not None:
        return y, S, x.new_empty(0), x.new_empty(0)
    return y, S, x.new_empty(R, K), x.new_empty(N, R)


def _fake_backward(
    dy: Tensor, x: Tensor, S: Tensor, A: Tensor, B: Tensor, needs: list[bool], *operands: Any
) -> tuple[Tensor, ...]:
    return tuple(
        tensor.new_empty(tensor.shape) if needed else x.new_empty(0)
        for tensor, needed in zip((x, *operands[:5], dy), needs, strict=True)
    )


def _are_plain(*given: Tensor | None) -> bool:
    """Whether nobody listens to the operator (no dispatch mode, no tensor subclass)."""
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in given
    )


def _stand_in(dy: Tensor, lora_A: Tensor) -> Tensor:
    """Shape, dtype and device of `X[..., K]` where its values are not needed: one element."""
    return dy.new_empty(()).expand(*dy.shape[:-1], lora_A.shape[1])


def _keep(ctx: Any, x: Tensor, saved: Sequence[Tensor], operands: Sequence[Any]) -> None:
    """X is kept for dW and dA alone: an adapter whose A is frozen holds no activation but S."""
    needs = ctx.needs_input_grad[2:]  # behind x and base
    kept = x if needs[_WEIGHT] or needs[_LORA_A] else None
    ctx.save_for_backward(kept, *saved, *operands[:_N_TENSORS])
    ctx.options = operands[_N_TENSORS:]


def _kept(ctx: Any, dy: Tensor) -> tuple[Tensor, list[Tensor], list[Any], Needs]:
    """`X`, then `S`, `A°`, `B°`, the operands, and what is needed of them."""
    x, S, A, B, *tensors = ctx.saved_tensors
    x = _stand_in(dy, tensors[_LORA_A]) if x is None else x
    of_x, of_base, *of_others = ctx.needs_input_grad[: 2 + _N_DIFFERENTIATED]
    projects = ctx.options[_RESIDUAL] and tensors[_WRITE_BASIS] is not None
    needs = Needs._make([of_x, *of_others, of_base and projects])
    return x, [S, A, B], [*tensors, *ctx.options], needs


def _with_base(ctx: Any, dy: Tensor, found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of Needs in the order of the inputs; unprojected, dbase is dY itself."""
    dx, *others, dbase = found
    return dx, dy if ctx.needs_input_grad[1] and dbase is None else dbase, *others


def _through_operator(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The backward as an operator, which what listens sees."""
    x, saved, operands, needs = _kept(ctx, dy)
    inputs = (dy, x, *saved, list(needs), *operands, ctx.backend)
    if torch.is_grad_enabled():  # create_graph=True: keep the node that refuses a second time
        found = _backward(*inputs)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            found = _backward(*inputs)
    return _with_base(ctx, dy, [g if need else None for g, need in zip(found, needs, strict=True)])


class _Plain(torch.autograd.Function):
    """Past the dispatcher, which takes 50 µs (forward) and 80 µs (backward) to pass the arguments,
    as much as the library calls of a small layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, *given: Any) -> Tensor:
        *differentiated, others, options, ctx.backend = given
        tensors = (*differentiated, *others)
        operands: tuple[Any, ...] = (*tensors, None, *options)
        op = Operands(*operands)
        ctx.module = module = _select(ctx.backend, x, op)
        if op.dropout_p > 0.0:
            op = replace(op, dropout_seed=module.draw_seed(x))
        y, saved = _computed(module, x, base, op)
        _keep(ctx, x, saved, (*tensors, op.dropout_seed, *options))
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = outputs
        if torch.is_grad_enabled():
            return *_through_operator(ctx, dy), None, None, None
        x, saved, operands, needs = _kept(ctx, dy)
        found = _differentiated(ctx.module, dy, x, saved, Operands(*operands), needs)
        return *_with_base(ctx, dy, found), None, None, None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, *operands: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            y, *saved = _forward(x, base, *operands)
        ctx.backend = operands[-1]
        _keep(ctx, x, saved, operands[:-1])
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return y, *saved

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy, *_), n_others = outputs, _N_TENSORS - _N_DIFFERENTIATED + len(ctx.options) + 1
        found = (None,) * (2 + _N_DIFFERENTIATED) if dy is None else _through_operator(ctx, dy)
        return *found, *(None,) * n_others


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "lora_linear cannot be differentiated twice; "
            "restore the stock layers with restore_lora_layers for gradients of gradients."
        )


for _name, _run, _fake, _autograd in (
    ("lora_linear", _run_forward, _fake_forward, _LoraLinear.apply),
    ("lora_linear_backward", _run_backward, _fake_backward, _OnceDifferentiable.apply),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"grasp_kernels::{_name}", _fake)
