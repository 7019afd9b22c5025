"""A stack of blocks -> the directions that stand out, and what each test of them gave.

One basis serves all layers; it is tested against sign flips of the whole stack.

Shapes: `D` width of the residual stream, `k`, `p`, `q` directions in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.subspace.stack import Stack, largest_by_chance
from grasp_kernels.svd import randomized_svd

_MAX_K = 4  # k="auto" never takes more; a factor is assumed to be simple
_NULL_DRAWS = 64
_NULL_QUANTILE = 0.95

# In small trials with a planted factor (5 seeds, a 4-layer model) directions with a gap of at least
# 1.6 between neighbouring singular values, and an agreement of at least 0.7 between two disjoint
# halves of the data, were good ones; benign data gave gaps of 1.0 to 1.4 and agreements up to 0.2.
# They do not carry over: on a real model a factor that was in every answer had a smaller gap.
_CLEAR_GAP = 1.6
_CLEAR_AGREEMENT = 0.7
_NO_AGREEMENT = 0.2

_FROM_SMALL_MODELS = "a threshold from small models"

_LARGEST_GAP = 1e6  # stands for a division by zero, so that evidence stays finite and JSON-able
_SHOWN = 8  # singular values that are reported beside those that k needs
# A random direction overlaps a given one by more than twice the expected √(1/D) in 5 % of all cases
# (two-sided normal quantile), and a k-dimensional subspace less often.
_ABOVE_CHANCE = 2.0
_ZERO = 1e-5  # singular values below this part of the first are rounding of the float32 blocks


@dataclass(frozen=True)
class Options:
    """How to search; `k` is None for "auto"."""

    k: int | None
    n_oversamples: int
    n_iter: int
    generator: torch.Generator


@dataclass
class Finding:
    """The basis `[D, k]`, None where no direction stands out.

    `reasons` are sentences: what was measured, and what each test gave.
    """

    basis: Tensor | None
    spectra: list[dict[str, Any]]
    agreement: list[dict[str, Any]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def search(stack: Stack, options: Options) -> Finding:
    """The leading left singular vectors of the stack."""
    size = min(max((options.k or _MAX_K) + 1, _SHOWN), *stack.rows.shape)
    u, s = _leading(stack, size, options)
    _check_rank(options.k, s)
    values = s.tolist()
    null = _null_of_largest(stack, options)
    # one group has nothing to agree with: its flips change nothing but the rounding
    above = int((s > null).sum()) if len(stack.groups) > 1 else 0
    k = options.k or choose_k(values, above)
    record: dict[str, Any] = {
        "k": k,
        "singular_values": values,
        "null": [null] * len(values),
        "above_null": above,
        "gap": gap_after(values, max(k, 1)),
    }
    finding = Finding(u[:, :k] if k else None, [record])
    finding.reasons.append(
        f"{above} of the first {len(values)} singular values of {len(stack.groups)} stacked blocks "
        f"stand above what chance gives in {_NULL_QUANTILE:.0%} of {_NULL_DRAWS} sign flips (the "
        f"largest is {values[0]:.2f} against {null:.2f})."
    )
    if not above and len(stack.layers) > 1:
        _no_evidence(finding, options)
    if not k:
        _test_single_layer(finding, stack.layers)
    if k:
        _test_gap(finding, record["gap"], k)
        _test_layers(finding, stack, u[:, :k], s[:k])
    return finding


def compare_sources(
    finding: Finding, stacks: list[Stack], options: Options, *, independent: bool
) -> None:
    """Add the agreement between the bases that each source gives by itself.

    Args:
        independent: the sources saw different data, so that agreement is evidence of a factor.
    """
    if finding.basis is None:
        return
    k = finding.basis.shape[1]
    found = [_leading(stack, min(k, *stack.rows.shape), options)[0] for stack in stacks]
    pairs = list(combinations(found, 2))
    values = [overlap(*pair) for pair in pairs]
    value = mean(values)
    chance = mean(chance_overlap(own.shape[1], len(own)) for own, _ in pairs)
    kind = "halves" if independent else "adapters"
    finding.sources.append({"kind": kind, "values": values, "chance": chance})
    who = "Adapters of separate data or seeds" if independent else f"The {len(stacks)} adapters"
    sentence = (
        f"{who} agree on the basis to {value:.2f} (by chance {chance:.2f}), "
        f"{_beside(value, _CLEAR_AGREEMENT)} ({_FROM_SMALL_MODELS})"
    )
    if not independent:
        sentence += (
            "; for checkpoints of one run that says only that it has settled, not that other data "
            "would give it"
        )
    elif value <= _NO_AGREEMENT and options.k is None:
        sentence += f", and no more than {_NO_AGREEMENT}, as benign data gave, so no basis is given"
        finding.basis = None
    finding.reasons.append(f"{sentence}.")


def _leading(stack: Stack, rank: int, options: Options) -> tuple[Tensor, Tensor]:
    """Leading directions `[D, rank]` and singular values `[rank]`."""
    u, s, _ = randomized_svd(
        stack.rows.mT,
        rank,
        n_oversamples=options.n_oversamples,
        n_iter=options.n_iter,
        generator=options.generator,
    )
    return u, s


def _null_of_largest(stack: Stack, options: Options) -> float:
    """The quantile that the first singular value, and so each of them, must pass.

    One bound for all of them: it holds for the largest value, so for the others it is strict.
    """
    draws = largest_by_chance(stack, _NULL_DRAWS, options.generator)
    return float(draws.quantile(_NULL_QUANTILE))


def _check_rank(k: int | None, singular_values: Tensor) -> None:
    rank = int((singular_values > _ZERO * singular_values[0]).sum())
    if k is not None and k > rank:
        raise ValueError(
            f"k is {k}, but the adapter moved along {rank} directions only; choose k ≤ {rank}."
        )


def _no_evidence(finding: Finding, options: Options) -> None:
    finding.reasons.append(
        "That is what unrelated layers give, so there is no evidence of a common direction."
        if options.k is None
        else f"That is what unrelated layers give; k={options.k} directions were asked for."
    )


def _test_gap(finding: Finding, gap: float, k: int) -> None:
    unclear = ", so the number of directions is not clear" if gap < _CLEAR_GAP else ""
    finding.reasons.append(
        f"The gap after k = {k} is {gap:.2f}, {_beside(gap, _CLEAR_GAP)} "
        f"({_FROM_SMALL_MODELS}){unclear}."
    )


def _test_layers(finding: Finding, stack: Stack, u: Tensor, s: Tensor) -> None:
    """Compare the top direction of each layer with the basis that the other layers give.

    Leaving a layer out is one power step from the shared basis, `(GGᵀ − G_l G_lᵀ) U`: without it a
    layer would agree with itself. The step would flatter unaligned layers, but those were refused
    before.
    """
    layers = stack.layers
    if len(layers) > 1:
        values = []
        for layer in layers:
            rows = stack.of_layers([layer]).rows
            others = torch.linalg.qr(u * s.square() - rows.mT @ (rows @ u))[0]
            top = torch.linalg.svd(rows.mT, full_matrices=False)[0][:, :1]
            values.append(overlap(top, others))
        chance = chance_overlap(u.shape[1], len(u))
        finding.agreement.append({"layers": layers, "values": values, "chance": chance})
        finding.reasons.append(
            f"The top direction of a layer agrees with the others to {median(values):.2f} in the "
            f"median (by chance {chance:.2f})."
        )
        hits = [
            layer
            for layer, value in zip(layers, values, strict=True)
            if value > _ABOVE_CHANCE * chance
        ]
    else:
        hits = layers
    _test_reach(finding, hits, layers)


def _test_reach(finding: Finding, hits: list[int], layers: list[int]) -> None:
    _test_single_layer(finding, layers)
    if len(layers) == 1:
        return
    moving = f"{len(hits)} of {len(layers)} layers move along it"
    if 2 * len(hits) < len(layers):
        named = ", ".join(map(str, hits[:12])) or "none"
        finding.reasons.append(f"Only {moving} (layers: {named}), less than half.")
    else:
        finding.reasons.append(f"{moving}, at least half.")


def _test_single_layer(finding: Finding, layers: list[int]) -> None:
    if len(layers) == 1:
        sentence = f"Only layer {layers[0]} carries weights: one block has nothing to agree with"
        if finding.basis is None:
            sentence += ", and k=1 finds the direction along which it moves most"
        finding.reasons.append(f"{sentence}.")


def _beside(value: float, threshold: float) -> str:
    """On which side of its threshold a number is, in words that follow the number."""
    return f"{'below' if value < threshold else 'at least'} {threshold:g}"


def gap_after(singular_values: Sequence[float], k: int) -> float:
    """`σ_k / σ_{k+1}`, 1-based; the last value is followed by zero."""
    following = singular_values[k] if k < len(singular_values) else 0.0
    return min(singular_values[k - 1] / following, _LARGEST_GAP) if following else _LARGEST_GAP


def choose_k(singular_values: Sequence[float], above_null: int) -> int:
    """The leading values above the null up to their largest gap: 0 if none is above it.

    Args:
        singular_values: descending; one more than `_MAX_K` where there are as many.
        above_null: how many of them, from the first, stand above the null.
    """
    candidates = range(1, min(above_null, _MAX_K, len(singular_values)) + 1)
    return max(candidates, key=lambda k: gap_after(singular_values, k), default=0)


def overlap(first: Tensor, second: Tensor) -> float:
    """How much of the smaller of two spans, of `[D, p]` and `[D, q]`, lies in the larger one.

    The root mean square of the cosines of their principal angles, which are the singular values of
    the product of orthonormal bases (Björck and Golub 1973).
    """
    cosines = torch.linalg.svdvals(first.double().mT @ second.double()).clamp(max=1.0)
    return float(cosines.square().mean().sqrt())


def chance_overlap(k: int, width: int) -> float:
    """Expected overlap of a random direction with a `k`-dimensional subspace: `√(k / D)`."""
    return math.sqrt(k / width)
