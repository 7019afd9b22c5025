"""The dtypes with matrix instructions on this CPU."""

from __future__ import annotations

import warnings

import torch
from torch import nn


def _has_instructions(name: str) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


# A constant of the process, so that the compiler of torch can read it.
_FAST = {torch.bfloat16: _has_instructions("bf16"), torch.float16: _has_instructions("fp16")}


def multiplies(dtype: torch.dtype) -> bool:
    """Say whether this CPU multiplies matrices of a dtype; otherwise float32 is far faster.

    256 x 1024 times 1024 x 1024 on one thread, with oneDNN held to AVX2 and without: `dY W` takes
    3.0 s and 14 ms in bfloat16, `X Wᵀ` 150 and 3 ms; in float32 both take 20 to 30 ms.
    """
    return _FAST.get(dtype, True)


def warn_if_slow(dtype: torch.dtype, remedy: str) -> None:
    """Warn if this CPU lacks instructions for products in a dtype."""
    if multiplies(dtype):
        return
    name = str(dtype).removeprefix("torch.")
    warnings.warn(
        f"This CPU has no instructions for products in {name}, so they take up to 100 times as "
        f"long as in float32: {remedy}.",
        stacklevel=3,
    )


def in_fast_dtype(model: nn.Module) -> nn.Module:
    """Return the model, in float32 and with a warning if this CPU is slow in its dtype."""
    dtypes = (p.dtype for p in model.parameters() if p.is_cpu and not multiplies(p.dtype))
    slow = next(dtypes, None)
    if slow is None:
        return model
    warn_if_slow(slow, "the model runs in float32 (set the dtype explicitly to avoid this)")
    return model.float()
