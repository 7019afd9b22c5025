"""Inputs and the float64 oracle.

The oracle is not the reference: it lets autograd differentiate an ordinary peft-style layer, in
which projections stand as steps of their own, so that a mistake in the algebra cannot hide in both.
Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.errors import RATIO, budget, relative_error
from benchmarks.kernels.provider import orthonormal
from grasp_kernels.ops.lora_linear import registry
from grasp_kernels.ops.lora_linear.api import lora_linear
from grasp_kernels.ops.lora_linear.dropout import dropout
from grasp_kernels.ops.projection import project_columns, project_gradient

__all__ = [
    "DIFFERENTIABLE",
    "RATIO",
    "Case",
    "budget",
    "call",
    "check_against_oracle",
    "differentiate",
    "differentiate_stock",
    "make_inputs",
    "orthonormal",
    "relative_error",
]

DIFFERENTIABLE = ("x", "weight", "bias", "lora_A", "lora_B", "lora_bias", "base")


@dataclass(frozen=True)
class Case:
    """One call of the operator."""

    T: int = 33
    K: int = 48
    N: int = 40
    R: int = 4
    Q: int = 0
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None  # None: the same
    project: str = "residual"
    closed: bool = True
    dropout_p: float = 0.0
    bias: bool = False
    lora_bias: bool = False
    scaling: float = 0.5
    expanded_dy: bool = False
    base: bool = False  # the base product is given, and there is no weight
    device: str = "cpu"

    def __str__(self) -> str:
        default = Case()
        fields = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return "-".join(f"{k}={v}".replace("torch.", "") for k, v in fields.items()) or "plain"


def make_inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    """Arguments for `lora_linear`, each term of the result of about the same size, and `dy`."""
    g = torch.Generator().manual_seed(seed)
    T, K, N, R = case.T, case.K, case.N, case.R
    adapter_dtype = case.adapter_dtype or case.dtype
    basis_dtype = torch.promote_types(case.dtype, torch.float32)

    def normal(*shape: int, fan_in: int = 1, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(*shape, generator=g) / fan_in**0.5).to(dtype)

    inputs = {
        "x": normal(T, K),
        "weight": normal(N, K, fan_in=K),
        "bias": normal(N) if case.bias else None,
        "lora_A": normal(R, K, fan_in=K, dtype=adapter_dtype),
        "lora_B": normal(N, R, fan_in=R, dtype=adapter_dtype),
        "lora_bias": normal(N, dtype=adapter_dtype) if case.lora_bias else None,
        "write_basis": orthonormal(N, case.Q, g, basis_dtype) if case.Q else None,
        "dy": normal(1, 1).expand(T, N) if case.expanded_dy else normal(T, N),
        "base": None,
    }
    if case.base:
        inputs |= {"base": normal(T, N), "weight": None, "bias": None}
    return {k: None if v is None else v.to(case.device) for k, v in inputs.items()}


def differentiate(case: Case, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """`y` and all gradients of the public operator; `options` go to `lora_linear`."""
    leaves = _leaves(inputs, None)
    return _results(call(case, inputs, leaves, **options), leaves, inputs["dy"])


def call(case: Case, inputs: dict[str, Any], leaves: dict[str, Any], **options: Any) -> Tensor:
    """`y` of the public operator, with `leaves` for what can be differentiated."""
    return lora_linear(
        **leaves,
        write_basis=inputs["write_basis"],
        scaling=case.scaling,
        project=case.project,
        closed=case.closed,
        dropout_p=case.dropout_p,
        **options,
    )


def differentiate_stock(
    case: Case,
    inputs: dict[str, Any],
    dtype: torch.dtype | None = None,
    without: str | None = None,
    backend: str = "aten",
) -> dict[str, Tensor]:
    """The same results from a peft-style layer under plain autograd.

    In float64 it is the oracle; in the dtype of the case it is the error that users have today.
    The mask is what `backend` draws for the next seed of torch's generator. `without` leaves one
    part out, for the test of the tests: "dX", "dS", "dB", "closure", "dropout".
    """
    compute = dtype or case.dtype
    leaves = _leaves(inputs, dtype)
    V = inputs["write_basis"]
    V = None if V is None else V.to(torch.promote_types(compute, torch.float32))
    x, A, B, b = (leaves[name] for name in ("x", "lora_A", "lora_B", "lora_bias"))
    if V is not None:
        if without != "dB":
            B = project_gradient(B.mT, V).mT
            b = None if b is None else project_gradient(b, V)
        if case.closed and without != "closure":
            B = project_columns(B, V)
            b = None if b is None else project_columns(b, V)

    x_adapter = x
    if case.dropout_p and without != "dropout":
        mask = _mask(case, inputs["x"], backend).to(compute)
        x_adapter = x * mask.div_(1.0 - case.dropout_p) if case.dropout_p < 1.0 else x * mask
    y = leaves["base"]
    if y is None:
        y = F.linear(x, leaves["weight"], leaves["bias"])
    adapter = F.linear(F.linear(x_adapter, A.to(compute)), B.to(compute))
    if b is not None:
        adapter = adapter + b.to(compute)
    if case.project == "residual" and V is not None:
        if without != "dX":
            y = project_gradient(y, V)
        if without != "dS":
            adapter = project_gradient(adapter, V)
    y = y + case.scaling * adapter
    return _results(y, leaves, inputs["dy"].to(compute))


def _mask(case: Case, x: Tensor, backend: str) -> Tensor:
    """What `backend` keeps of `x[T, K]` for the next seed of torch's generator, bool `[T, K]`."""
    module = registry.load(backend)
    assert not isinstance(module, str)
    seed = module.draw_seed(x)
    if backend in registry.KERNELS:
        from tests.helpers.kernels import keep_mask

        return keep_mask(x, seed, case.dropout_p)
    return dropout(torch.ones_like(x), seed, case.dropout_p, x) != 0


def _leaves(inputs: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    return {
        name: None
        if inputs[name] is None
        else inputs[name].detach().to(dtype or inputs[name].dtype).requires_grad_()
        for name in DIFFERENTIABLE
    }


def _results(y: Tensor, leaves: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(y, list(present.values()), dy)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(present, gradients, strict=True)}


def check_against_oracle(
    case: Case, backend: str, without: str | None = None
) -> dict[str, tuple[float, float]]:
    """The results of one case that are over budget: name -> (error, budget).

    Errors are medians over draws, more of them where `dS[T, R]` has few elements: the rounding of
    a single number is luck. `without` cripples the oracle, not the budget.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(5 + 60 // (case.T * case.R) if case.T else 1):
        inputs = make_inputs(case, seed)
        torch.manual_seed(seed)
        found = differentiate(case, inputs, backend=backend)
        torch.manual_seed(seed)
        stock = differentiate_stock(case, inputs, backend=backend)
        torch.manual_seed(seed)
        oracle = differentiate_stock(case, inputs, torch.float64, backend=backend)
        torch.manual_seed(seed)
        target = oracle
        if without:
            target = differentiate_stock(case, inputs, torch.float64, without, backend)
        for name in oracle:
            pair = (
                relative_error(found[name], target[name]),
                relative_error(stock[name], oracle[name]),
            )
            errors.setdefault(name, []).append(pair)
    worse = {}
    for name, pairs in errors.items():
        error, stock_error = (median(values) for values in zip(*pairs, strict=True))
        allowed = budget(stock_error, case.dtype, max(case.T, case.K, case.N))
        if not error <= allowed:  # also true for NaN
            worse[name] = (error, allowed)
    return worse
