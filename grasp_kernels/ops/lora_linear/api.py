"""The public operator. It imports no kernel.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels.ops.autocast import autocast_dtype
from grasp_kernels.ops.gated import Gate
from grasp_kernels.ops.lora_linear.differentiated import (
    N_DIFFERENTIATED,
    Plain,
    are_plain,
    operator,
)
from grasp_kernels.ops.lora_linear.dropout import device_seed
from grasp_kernels.ops.lora_linear.operands import Operands
from grasp_kernels.ops.lora_linear.registry import KERNELS, prefers_kernels

PROJECTIONS = ("residual", "weights")


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
    project: str = "residual",
    closed: bool = True,
    dropout_p: float = 0.0,
    backend: str = "auto",
    source: Gate | None = None,
) -> Tensor:
    """Compute `Y = X Wᵀ + bias + s (X̃ Aᵀ) B°ᵀ`, with a gradient projected off the basis.

    Args:
        x: `X[..., K]` in the dtype of `weight` (or under autocast, which casts both).
        weight, bias: the base layer, `W[N, K]` and `[N]`; usually frozen. None with `base`.
        lora_A, lora_B: `A[R, K]`, `B[N, R]`, perhaps float32 over a bfloat16 base. Outside of
            autocast the adapter's products are then float32, as in peft. Kernels requested by name
            round the adapter to the dtype of the activations, as autocast does.
        scaling: the `s` of LoRA, `alpha / R` or `alpha / √R`.
        base: `[..., N]`, the output of the base layer for `x`, in place of its weight: for weights
            stored and multiplied by another library (4 bits, 8 bits). `x` is cast to the dtype of
            `base`. The gradient of `base` is the projected `dY`, so that the backward of the base
            layer is projected too. `base` is not changed in place.
        lora_bias: `b[N]`, adds `s b°`.
        write_basis: `V[N, Q]`, float32, orthonormal columns in the residual stream.
        project: "residual" projects the arriving `dY` before anything uses it. "weights", for a
            layer with an output outside of the stream, projects `dA` and `dB` and leaves `dX`.
        closed: compute with `B° = (I − V Vᵀ) B`, so that the update writes nothing along the
            basis, whatever the optimizer does.
        dropout_p: probability of dropout: `X` becomes `X̃`, by torch's generator of the device.
        backend: "reference", "aten", "triton" or "cuda"; "auto": kernels where they were measured
            to be faster (long bfloat16 calls on Hopper), else "aten".
        source: `X` as a product of a gated MLP. The backward computes it again and `X` is not kept.

    Returns:
        `Y[..., N]` in the dtype of the activations.

    Raises:
        ValueError, TypeError: tensors that do not fit, or a backend that cannot run here.
        RuntimeError: gradients of gradients.
    """
    if base is None:
        x, weight, bias = _autocast(x, weight, bias)
    else:
        x = x.to(base.dtype)
    tensors = (weight, bias, lora_A, lora_B, lora_bias, write_basis)
    _check(x, base, *tensors)
    if project not in PROJECTIONS:
        raise ValueError(f"project is {project!r}; use one of {PROJECTIONS}.")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; use a probability between 0 and 1.")
    exact = backend not in KERNELS and is_exact(x.dtype, lora_A)
    options = float(scaling), float(dropout_p), project == "residual", closed, exact
    op = Operands(weight, bias, lora_A, lora_B, lora_bias, write_basis, None, *options)
    if torch.compiler.is_compiling():
        # Its compiler sees library calls; kernels stay opaque operators.
        short = x.dim() < 2 or not prefers_kernels(x.flatten(0, -2), op)
        if backend == "aten" or (backend == "auto" and short):
            return _traced(x, base, op)
    elif are_plain(x, base, *tensors):
        return Plain.apply(x, base, *op[:N_DIFFERENTIATED], op, backend, source)
    seed = device_seed(x) if dropout_p > 0.0 else None
    y, *_ = operator(x, base, *op._replace(dropout_seed=seed), backend)
    return y


def _traced(x: Tensor, base: Tensor | None, op: Operands) -> Tensor:
    """Return `Y[..., N]` by operations that the compiler of torch traces, dropout by its own."""
    if op.dropout_p > 0.0:
        if op.weight is not None:
            base = F.linear(x, op.weight, op.bias)
        x = F.dropout(x.to(op.adapter_dtype(x)), op.dropout_p)
        op = op._replace(weight=None, bias=None, dropout_p=0.0)
    return Plain.apply(x, base, *op[:N_DIFFERENTIATED], op, "aten", None)


def is_exact(dtype: torch.dtype, lora_A: Tensor) -> bool:
    """Say whether an adapter is multiplied in its own dtype, wider than the activations'."""
    wide = torch.promote_types(dtype, lora_A.dtype) != dtype
    return wide and autocast_dtype(lora_A.device) is None


def _autocast(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cast a linear layer as autocast does; the adapter and the basis keep their precision."""
    dtype = autocast_dtype(x.device)
    if dtype is None or x.dtype == torch.float64:
        return x, weight, bias
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
) -> None:
    """Raise one sentence on arguments that do not fit."""
    if base is not None and any(given is not None for given in (weight, bias)):
        raise ValueError("base replaces weight and bias; leave those out if you give it.")
    (N, K), R = _widths(x, weight, base), lora_A.shape[0]
    if R == 0:
        raise ValueError("lora_A has rank 0; a LoRA layer needs a rank of at least 1.")
    Q = 0 if write_basis is None else write_basis.shape[-1]
    rows, device, dtype = x.shape[:-1], x.device, x.dtype
    for name, tensor, shape in (
        ("base", base, (*rows, N)),
        ("x", x, (*rows, K)),
        ("bias", bias, (N,)),
        ("lora_A", lora_A, (R, K)),
        ("lora_B", lora_B, (N, R)),
        ("lora_bias", lora_bias, (N,)),
        ("write_basis", write_basis, (N, Q)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} for a weight {(N, K)}."
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {device}; move it there.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; convert it to a float dtype.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype} but x is {dtype}; cast one or use autocast.")


def _widths(x: Tensor, weight: Tensor | None, base: Tensor | None) -> tuple[int, int]:
    """Return N and K."""
    given, name, form = (weight, "weight", "[N, K]") if base is None else (base, "base", "[..., N]")
    if given is None:
        raise ValueError("weight is None; pass that of the base layer, or its output as base.")
    if x.dim() < 1 or given.dim() != (2 if base is None else x.dim()):
        raise ValueError(
            f"x {tuple(x.shape)} and {name} {tuple(given.shape)} must be [..., K] and {form}."
        )
    return (given.shape[0], given.shape[1]) if base is None else (given.shape[-1], x.shape[-1])
