"""The backends of the operator: all of them, the runnable ones, and the one for a call.

Shapes: T tokens, K in, N out.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from grasp_kernels.ops.lora_linear.operands import Operands

KERNELS = ("cuda", "triton")
BACKENDS = (*KERNELS, "aten", "reference")  # the reference is last and runs everywhere
_EVERYWHERE = BACKENDS[len(KERNELS) :]

# The rule of `auto`: on an H200 and in bfloat16 both kernels were faster than `aten` in all 12
# shapes of a layer of Llama-3.1-8B, T = 8192; on an H100, before they were improved, `triton` in 4
# of 5 and `cuda` in 2 (`benchmarks/results/backends.json`). The two are within 2 % of each other
# but for the narrowest layers. `cuda` launches less from Python, and so wins a step of 8 layers
# with activation checkpointing, T = 4096: 127 ms, `aten` 132, `triton` 133 (`h200.jsonl` in the
# same folder). No other GPU and no other dtype was timed.
#
# With fewer tokens the GPU waits for Python: a decoder layer takes 6.2 ms with `aten`, 7.2 with
# `cuda` and 9.8 with `triton` at T = 2048, and 20.2, 19.8 and 19.8 at 8192.
LEAST_TOKENS = 4096
# The same for narrow layers: `T K N` of a square layer of 4096 with 4096 tokens. Predicted from
# Python's time a layer, which does not depend on its width; narrow models were not measured.
_LEAST_WORK = 1 << 36


@cache
def load(name: str) -> ModuleType | str:
    """Import a backend and return its module, or the reason for the failed import."""
    place = f"{name}.backend" if name in KERNELS else name
    try:
        return importlib.import_module(f"{__package__}.{place}")
    except ModuleNotFoundError as error:
        return f"{str(error.name).split('.')[0]} is not installed"
    except ImportError as error:  # an old release of a package that is there
        return f"{error.name} is too old for it ({error.msg})"


def why_not(name: str, where: torch.device) -> str | None:
    """Say why the backend cannot run on a device, or None if it can."""
    module = load(name)
    return module if isinstance(module, str) else module.unsupported(where)


def backends(where: torch.device | str | None = None) -> dict[str, str | None]:
    """Return every backend with the reason why it cannot run on the device, or None if it can."""
    if where is None:
        where = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: why_not(name, torch.device(where)) for name in BACKENDS}


def computes(backend: str, dtype: torch.dtype) -> bool:
    """Say whether an installed backend computes with activations of a dtype."""
    module = load(backend)
    return isinstance(module, str) or dtype in module.DTYPES


def select(backend: str, x: Tensor, op: Operands) -> ModuleType:
    """Return the backend for `x[T, K]`; forward and backward see equal shapes and so agree.

    An explicit request never falls back: it runs, or raises with the reason.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown; use 'auto' or one of {BACKENDS}.")
    order: tuple[str, ...] = (backend,)
    if backend == "auto":
        order = BACKENDS if prefers_kernels(x, op) else _EVERYWHERE
    reason: str | None = None
    for name in order:
        module, reason = load(name), why_not(name, x.device)
        if reason is None and not isinstance(module, str):
            reason = module.refuses(x, op)
            if reason is None:
                return module
    raise ValueError(f"backend {backend!r} cannot run on {x.device}: {reason}; use backend='auto'.")


def prefers_kernels(x: Tensor, op: Operands) -> bool:
    """Say whether kernels are faster than library calls, according to the measurements."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not measured_on(x.device):
        return False
    # Timed with the base product; kernels round a wider adapter to the dtype of the activations.
    if op.weight is None or op.exact:
        return False
    return x.shape[0] >= least_tokens(*op.weight.shape)


def least_tokens(N: int, K: int) -> int:
    """Return the tokens of a call from which on kernels are faster for `W[N, K]`."""
    return max(LEAST_TOKENS, -(-_LEAST_WORK // (N * K)))


def measured_on(where: torch.device) -> bool:
    """Say whether a device is a Hopper, the one kind with timed kernels."""
    return _is_hopper(where)


# As `torch.compiler.assume_constant_result`, which imports the whole compiler.
vars(measured_on)["_dynamo_marked_constant"] = True


@cache
def _is_hopper(where: torch.device) -> bool:
    if where.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(where) == (9, 0)
