"""`KL(base ‖ model)` from hidden states and the head, without the logits `[n, V]` of either model.

    z = H Wᵀ + b,   L = Σ_v p_v (log p_v − log q_v),   dL/dz = q − p,   dH = (q − p) W

The positions pass in parts of a few rows. A part computes its gradient together with its loss, as
Liger's losses do (arXiv 2410.10989), so no logits are kept for backward and none are made again.

A base model that is known by its likeliest tokens has one probability for all others. `q − p` is
the gradient there too, with this probability spread over the other tokens as the model spreads it.

Shapes: n positions, c positions of a part, D residual width, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from grasp_kernels.ops.autocast import autocast_dtype, without_autocast
from grasp_kernels.ops.kernels import kernels_on

REST = 1e-6  # less than this is what float32 rounds, and no probability
# Logits of a part. More of them use a GPU better: the head of 8B is read once a part, which takes
# as long as its product with 190 rows.
_PART_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 25}


class Likeliest(NamedTuple):
    """Hold the likeliest tokens of a base model.

    Attributes:
        tokens: distinct token ids, int `[..., k]`.
        log_probs: their log probabilities, float32 `[..., k]`.
    """

    tokens: Tensor
    log_probs: Tensor


def fused_linear_kl(
    hidden: Tensor,
    weight: Tensor,
    base: Tensor | Likeliest,
    *,
    bias: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Compute `KL(base ‖ model)` in nats without the logits of either model.

    Products are in the dtype of the hidden states, or of autocast; logits and sums in float32. A
    rerun gives the same bits. The gradient reaches `hidden`, `weight` and `bias`; those of the head
    are summed in float32. The base model is a constant.

    Args:
        hidden: inputs of the head `H[..., D]`, after the last norm.
        weight: the head `W[V, D]`; tied heads are the embeddings.
        base: the same of the base model, `[..., D]`, or its likeliest tokens. All tokens but those
            count as one then, and the loss is a lower bound.
        bias: of the head, `[V]`.
        base_weight, base_bias: head of the base model; without `base_weight` it is the model's.
        softcap: `c` of final logits `c tanh(z / c)`, as Gemma 2 has them.
        mask: bool `[...]`, the positions that count; None: all. Others may hold anything.
        reduction: mean or sum over the positions that count. Without any the loss is 0.

    Returns:
        A float32 scalar (float64 for float64).

    Raises:
        ValueError: tensors that do not fit together, a softcap that is not positive, or an unknown
            reduction.
        RuntimeError: in the backward, a second derivative.
    """
    if base_weight is None:
        base_weight, base_bias = weight, bias if base_bias is None else base_bias
    _check(hidden, weight, base, bias, base_weight, base_bias, softcap, mask, reduction)
    rows = slice(None) if mask is None else mask.flatten()
    H = hidden.reshape(-1, hidden.shape[-1])[rows]
    known: tuple[Tensor | None, ...]
    if isinstance(base, Likeliest):
        known = tuple(part.reshape(-1, part.shape[-1])[rows] for part in base)
    else:
        known = base.reshape(-1, base.shape[-1])[rows], base_weight, base_bias
    if (dtype := autocast_dtype(hidden.device)) is not None and H.dtype != torch.float64:
        H, weight = H.to(dtype), weight.to(dtype)
        if not isinstance(base, Likeliest):
            known = (*(None if t is None else t.to(dtype) for t in known[:2]), base_bias)
    known = tuple(None if part is None else part.detach() for part in known)
    is_recorded = torch.is_grad_enabled()
    loss: Tensor = without_autocast(_LinearKL.apply, H, weight, bias, known, softcap, is_recorded)
    return loss / max(1, len(H)) if reduction == "mean" else loss


class _LinearKL(torch.autograd.Function):
    """The sum over positions; `known` is `(H°, W°, b°)` or `Likeliest` of the base model."""

    @staticmethod
    def forward(
        ctx: Any,
        H: Tensor,
        W: Tensor,
        b: Tensor | None,
        known: tuple[Tensor, ...],
        softcap: float | None,
        is_recorded: bool,
    ) -> Tensor:
        needs = [needed and is_recorded for needed in ctx.needs_input_grad[:3]]
        wide = torch.promote_types(H.dtype, torch.float32)
        dH = torch.empty_like(H, memory_format=torch.contiguous_format) if needs[0] else None
        dW, db = (
            torch.zeros_like(t, dtype=wide) if needed and t is not None else None
            for needed, t in zip(needs[1:], (W, b), strict=True)
        )
        loss = H.new_zeros((), dtype=wide)
        step = max(1, _PART_LOGITS.get(H.device.type, 1 << 25) // len(W))
        for start in range(0, len(H), step):
            part = slice(start, start + step)
            z = _logits(H[part], W, b)
            if len(known) == 2:
                tokens, log_probs = (t[part] for t in known)
                losses, G = _apart_from_likeliest(z, tokens, log_probs, softcap)
            else:
                base = _logits(known[0][part], *known[1:])
                losses, G = _apart(z, base, softcap, H.dtype)
            loss += losses.sum()
            if not any(needs):
                continue
            if db is not None:
                db += G.sum(dim=0, dtype=wide)
            G = G.to(H.dtype)
            if dH is not None:
                torch.mm(G, W, out=dH[part])
            if dW is not None:
                dW += _wide_product(G.mT, H[part])
        ctx.save_for_backward(dH, dW, db)
        ctx.dtypes = H.dtype, W.dtype, None if b is None else b.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_linear_kl has no second derivative (create_graph=True): differentiate a "
                "loss on logits instead."
            )
        found = (
            None if gradient is None else (gradient.to(grad.dtype) * grad).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *found, None, None, None


def _logits(H: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """Return `[c, V]` in float32 at least."""
    z = _wide_product(H, W.mT)
    return z if b is None else z.add_(b)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `L R` in float32 at least, unrounded where the library can."""
    if left.is_cuda and left.element_size() == 2 and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.float16:  # sums over many rows may be too large for it
        left, right = left.float(), right.float()
    return (left @ right).to(torch.promote_types(left.dtype, torch.float32))


def _apart(
    z: Tensor, base: Tensor, softcap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the divergences `[c]` and their gradients `[c, V]`; logits `[c, V]` are overwritten.

    Kernels return the gradients in `dtype`.
    """
    if (kernels := _kernels(z)) is not None:
        found: tuple[Tensor, Tensor] = kernels.divergence(z, base, softcap, dtype)
        return found
    slope = _cap_(z, softcap)
    _cap_(base, softcap)
    log_q = z.sub_(z.logsumexp(dim=-1, keepdim=True))
    log_p = base.sub_(base.logsumexp(dim=-1, keepdim=True))
    difference = log_p - log_q
    p = log_p.exp_()
    losses = difference.mul_(p).masked_fill_(p == 0, 0).sum(dim=-1)  # 0 log 0 is 0
    G = log_q.exp_().sub_(p)
    return losses, G if slope is None else G.mul_(slope)


def _apart_from_likeliest(
    z: Tensor, tokens: Tensor, log_probs: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the same of a base model that is known by tokens and log probabilities `[c, k]`."""
    slope = _cap_(z, softcap)
    tokens, log_probs = tokens.long(), log_probs.to(z.dtype)
    z -= z.amax(dim=-1, keepdim=True)
    found = z.gather(1, tokens)
    sums = z.exp_().sum(dim=-1, keepdim=True)
    found = found - sums.log()
    losses = likeliest_divergence(log_probs, found)
    p, q = log_probs.exp(), found.exp()
    rest, of_model = (1 - probabilities.sum(dim=-1, keepdim=True) for probabilities in (p, q))
    rest = torch.where(rest > REST, rest, 0)
    # A probability of the model too small for float32 is held in `likeliest_divergence`.
    held = of_model <= REST
    known = p.sum(dim=-1, keepdim=True)
    all_of_it = torch.where(held, known, known + rest)
    G = z.mul_((all_of_it - torch.where(held, 0, rest / of_model)) / sums)
    G.scatter_(1, tokens, all_of_it * q - p)
    return losses, G if slope is None else G.mul_(slope)


def likeliest_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return the divergences `[n]` of log probabilities `[n, k]`, all other tokens as one."""
    p = wanted.exp()
    rest, of_model = (1 - logs.exp().sum(dim=-1) for logs in (wanted, found))
    rest = torch.where(rest > REST, rest, 0)
    beyond = torch.xlogy(rest, rest) - torch.xlogy(rest, of_model.clamp_min(REST))
    known = torch.where(p > 0, p * (wanted - found), 0)  # 0 log 0 is 0
    return known.sum(dim=-1) + beyond


def _cap_(z: Tensor, softcap: float | None) -> Tensor | None:
    """Write `c tanh(z / c)` over `z`, and return its slope."""
    if softcap is None:
        return None
    z.div_(softcap).tanh_()
    slope = 1 - z * z
    z.mul_(softcap)
    return slope


def _check(
    hidden: Tensor,
    weight: Tensor,
    base: Tensor | Likeliest,
    bias: Tensor | None,
    base_weight: Tensor,
    base_bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    reduction: str,
) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [..., D] and "
            "[V, D]: give the input and the weight of the head."
        )
    V, where = len(weight), hidden.shape[:-1]
    if 0 in weight.shape or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {tuple(weight.shape)}: give real numbers and a "
            "head of one token and one feature at least."
        )
    tensors = {"hidden": hidden, "weight": weight}
    if not isinstance(base, (Tensor, Likeliest)):
        raise ValueError(f"base is a {type(base).__name__}: give hidden states or Likeliest.")
    known: tuple[Tensor, ...] = (base,) if isinstance(base, Tensor) else base
    if isinstance(base, Likeliest):
        tokens, log_probs = base
        if tokens.shape != log_probs.shape or tokens.shape[:-1] != where or not tokens.shape[-1]:
            raise ValueError(
                f"tokens {tuple(tokens.shape)} and log_probs {tuple(log_probs.shape)} must both be "
                f"{[*where, 'k']} with k from 1, as hidden is {tuple(hidden.shape)}."
            )
        if tokens.is_floating_point() or not log_probs.is_floating_point():
            raise ValueError(
                f"tokens are {tokens.dtype} and log_probs {log_probs.dtype}: give token ids and "
                "logarithms of probabilities."
            )
        if base_weight is not weight:
            raise ValueError(
                "base_weight is the head of hidden states, and base has tokens: leave it out."
            )
    else:
        if base.shape[:-1] != where or base_weight.shape != (V, base.shape[-1]):
            raise ValueError(
                f"base {tuple(base.shape)} and its head {tuple(base_weight.shape)} must be "
                f"{[*where, 'D']} and [{V}, D], at the positions and with the vocabulary of hidden "
                f"{tuple(hidden.shape)}."
            )
        tensors |= {"base": base, "base_weight": base_weight}
    if autocast_dtype(hidden.device) is None and len({t.dtype for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(f"{found}: give all in one dtype.")
    everything = (hidden, weight, *known, bias, base_weight, base_bias, mask)
    if len(places := {str(t.device) for t in everything if t is not None}) > 1:
        raise ValueError(f"Tensors are on {', '.join(sorted(places))}: give all on one device.")
    for name, one in (("bias", bias), ("base_bias", base_bias)):
        if one is not None and one.shape != (V,):
            raise ValueError(f"{name} is {tuple(one.shape)}: give [{V}], as weight has rows.")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != where):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}: give bool {list(where)}, a position each."
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}: give a positive number, or None for no cap.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'.")


def _kernels(z: Tensor) -> Any:
    """Return the module of the kernels for logits `[c, V]` on a GPU, or None."""
    if not z.is_cuda or z.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    return kernels_on(z.device, "linear_kl")
