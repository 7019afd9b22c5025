"""The divergence of two rows of logits and its gradient: two reads of each row and one write.

Library calls read or write rows seventeen times. Shapes: c rows, V vocabulary.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels.ops.gpu.blocks import rounded
from grasp_kernels.ops.gpu.launch import kernel_support, launch

__all__ = ["divergence", "kernel_support"]
_BLOCK, _WARPS = 4096, 8  # 16 elements a thread


@triton.jit
def _capped(logits, at, V, cap, CAPPED: tl.constexpr):
    """Load `z` and `tanh(z / cap)`; beyond the row a number whose exponential is 0."""
    z = tl.load(logits + at, mask=at < V, other=0.0)
    tanh = z * 0.0
    if CAPPED:
        x = z / cap
        square = x * x
        small = x * (1.0 - square * (0.33333334 - square * 0.13333334))  # to 5e-8 below .1
        tanh = tl.where(square < 0.01, small, tl.sigmoid(x * 2.0) * 2.0 - 1.0)
        z = tanh * cap
    return tl.where(at < V, z, -1e38), tanh


@triton.jit
def _added(z, highest, total):
    """Return maximum and sum of exponentials of a row with a block more."""
    new = tl.maximum(tl.maximum(highest, tl.max(z, axis=0)), -1e38)  # a block may be all -inf
    return new, total * tl.exp(highest - new) + tl.sum(tl.exp(z - new), axis=0)


@triton.jit(do_not_specialize=["V", "cap"])
def _divergence_kernel(
    logits, base, losses, gradients, V, cap,
    CAPPED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute `losses[c]`, and `gradients[c, V]` by the logits before their cap."""
    if ALIGNED:  # V is not specialised: this permits the compiler to vectorise
        V = V // 16 * 16
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    base += row * V
    gradients += row * V
    places = tl.arange(0, BLOCK)
    highest, total = float("-inf"), 0.0
    base_highest, base_total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        z, _ = _capped(logits, start + places, V, cap, CAPPED)
        highest, total = _added(z, highest, total)
        z, _ = _capped(base, start + places, V, cap, CAPPED)
        base_highest, base_total = _added(z, base_highest, base_total)
    log_sum = highest + tl.log(total)
    base_log_sum = base_highest + tl.log(base_total)
    loss = 0.0
    for start in range(0, V, BLOCK):
        at = start + places
        z, tanh = _capped(logits, at, V, cap, CAPPED)
        z0, _ = _capped(base, at, V, cap, CAPPED)
        log_q, log_p = z - log_sum, z0 - base_log_sum
        p = tl.exp(log_p)
        loss += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), axis=0)  # 0 log 0 is 0
        g = (tl.exp(log_q) - p) * (1.0 - tanh * tanh)
        tl.store(gradients + at, rounded(g, gradients.dtype.element_ty), mask=at < V)
    tl.store(losses + row, loss)


def divergence(
    logits: Tensor, base: Tensor, softcap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the divergences `[c]` and their gradients `[c, V]` in `dtype`.

    Args:
        logits, base: of the model and of its base, contiguous float32 `[c, V]`, before a cap.
        softcap: as for `fused_linear_kl`.
    """
    c, V = logits.shape
    losses = torch.empty(c, dtype=torch.float32, device=logits.device)
    gradients = torch.empty(c, V, dtype=dtype, device=logits.device)
    launch(
        _divergence_kernel, (c,), logits, num_warps=_WARPS,
        logits=logits, base=base, losses=losses, gradients=gradients, V=V, cap=softcap or 1.0,
        CAPPED=softcap is not None, ALIGNED=V % 16 == 0, BLOCK=_BLOCK,
    )  # fmt: skip
    return losses, gradients
