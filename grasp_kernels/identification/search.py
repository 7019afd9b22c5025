"""A stack of blocks -> the directions that stand out, and what each test of them gave.

Two searches, one basis for all layers or one for each layer, with the same kind of answer. Both
test against sign flips of their own: of the whole stack for a shared basis, of the neighbouring
layers for the basis of a single layer, which has too few blocks to be tested within itself.

Shapes: `D` width of the residual stream, `k` directions in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.identification.evidence import (
    CLEAR_AGREEMENT,
    CLEAR_GAP,
    FROM_SMALL_MODELS,
    MAX_K,
    NO_AGREEMENT,
    NULL_DRAWS,
    NULL_QUANTILE,
    beside,
    chance_overlap,
    choose_k,
    count_above,
    gap_after,
    more_than_chance,
    overlap,
)
from grasp_kernels.identification.stack import Stack, largest_by_chance, support, support_by_chance

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
    """One basis for all layers, one by layer, or None where none stands out.

    `reasons` are sentences: what was measured, and what each test gave.
    """

    bases: Tensor | dict[int, Tensor] | None
    spectra: list[dict[str, Any]]
    agreement: list[dict[str, Any]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def search_shared(stack: Stack, options: Options) -> Finding:
    """One basis for all layers: the leading left singular vectors of the stack."""
    size = min(max((options.k or MAX_K) + 1, _SHOWN), *stack.rows.shape)
    u, s = _leading(stack, size, options)
    _check_rank(options.k, s, "the adapter")
    values = s.tolist()
    null = _null_of_largest(stack, options)
    # one group has nothing to agree with: its flips change nothing but the rounding
    above = count_above(s, torch.full_like(s, null)) if len(stack.groups) > 1 else 0
    k = options.k or choose_k(values, above)
    record: dict[str, Any] = {
        "layer": None,
        "k": k,
        "singular_values": values,
        "null": [null] * len(values),
        "above_null": above,
        "gap": gap_after(values, max(k, 1)),
    }
    finding = Finding(u[:, :k] if k else None, [record])
    finding.reasons.append(
        f"{above} of the first {len(values)} singular values of {len(stack.groups)} stacked blocks "
        f"stand above what chance gives in {NULL_QUANTILE:.0%} of {NULL_DRAWS} sign flips (the "
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


def search_layers(stack: Stack, options: Options) -> Finding:
    """One basis for each layer: the left singular vectors of its own blocks.

    The blocks of one layer are too few for a null of their own, so its directions must show up in
    the blocks of the neighbouring layers, which had no part in finding them.
    """
    layers = stack.layers
    found = [_search_layer(stack, position, options) for position in range(len(layers))]
    records = [record for _, record in found]
    hits = [record["layer"] for record in records if record["above_null"]]
    convincing = more_than_chance(len(hits), len(layers))
    bases = {r["layer"]: u[:, : r["k"]].contiguous() for u, r in found if r["k"]}
    finding = Finding(bases if convincing or options.k else None, records)
    finding.reasons.append(
        f"The directions of {len(hits)} of {len(layers)} layers show up in the neighbouring layers "
        f"more than {NULL_QUANTILE:.0%} of {NULL_DRAWS} sign flips do."
    )
    if len(layers) > 1 and not convincing:
        _no_evidence(finding, options)
    if finding.bases is None:
        _test_single_layer(finding, layers)
        return finding
    _test_gap(finding, median(record["gap"] for record in records if record["k"]), None)
    if len(layers) > 1:
        tops = [u[:, :1] for u, _ in found]
        values = [
            mean(overlap(tops[i], tops[j]) for j in (i - 1, i + 1) if 0 <= j < len(tops))
            for i in range(len(tops))
        ]
        _record_agreement(finding, layers, values, chance_overlap(1, stack.rows.shape[1]))
    _test_reach(finding, hits, layers)
    return finding


def compare_sources(
    finding: Finding, stacks: list[Stack], options: Options, *, independent: bool
) -> None:
    """Add the agreement between the bases that each source gives by itself.

    Args:
        independent: the sources saw different data, so that agreement is evidence of a factor.
    """
    if finding.bases is None:
        return
    found = [_bases_like(finding.bases, stack, options) for stack in stacks]
    common = [
        [(first[key], second[key]) for key in first if key in second]
        for first, second in combinations(found, 2)
    ]
    if not all(common):
        finding.reasons.append("The adapters to compare have no layer in common.")
        return
    values = [mean(overlap(*pair) for pair in pairs) for pairs in common]
    value = mean(values)
    chance = mean(chance_overlap(own.shape[1], len(own)) for pairs in common for own, _ in pairs)
    kind = "halves" if independent else "adapters"
    finding.sources.append({"kind": kind, "values": values, "chance": chance})
    who = "Adapters of separate data or seeds" if independent else f"The {len(stacks)} adapters"
    sentence = (
        f"{who} agree on the basis to {value:.2f} (by chance {chance:.2f}), "
        f"{beside(value, CLEAR_AGREEMENT)} ({FROM_SMALL_MODELS})"
    )
    if not independent:
        sentence += (
            "; for checkpoints of one run that says only that it has settled, not that other data "
            "would give it"
        )
    elif value <= NO_AGREEMENT and options.k is None:
        sentence += f", and no more than {NO_AGREEMENT}, as benign data gave, so no basis is given"
        finding.bases = None
    finding.reasons.append(f"{sentence}.")


def _leading(stack: Stack, rank: int, options: Options) -> tuple[Tensor, Tensor]:
    return stack.leading(
        rank,
        n_oversamples=options.n_oversamples,
        n_iter=options.n_iter,
        generator=options.generator,
    )


def _null_of_largest(stack: Stack, options: Options) -> float:
    """The quantile that the first singular value, and so each of them, must pass.

    One bound for all of them: it holds for the largest value, so for the others it is strict.
    """
    draws = largest_by_chance(stack, NULL_DRAWS, options.generator)
    return float(draws.quantile(NULL_QUANTILE))


def _search_layer(stack: Stack, position: int, options: Options) -> tuple[Tensor, dict[str, Any]]:
    """Directions of one layer, and their spectrum with the support that neighbours give."""
    layers = stack.layers
    layer = layers[position]
    neighbours = layers[max(position - 1, 0) : position] + layers[position + 1 : position + 2]
    u, s, _ = torch.linalg.svd(stack.of_layers([layer]).rows.mT, full_matrices=False)
    _check_rank(options.k, s, f"layer {layer}")
    values = s[: max(options.k or 0, MAX_K) + 1].tolist()
    tested = u[:, :MAX_K]
    supported, null = torch.zeros(1), torch.zeros(1)
    if neighbours:
        around = stack.of_layers(neighbours)
        supported = support(around, tested)
        draws = support_by_chance(around, tested, NULL_DRAWS, options.generator)
        null = draws.quantile(NULL_QUANTILE, dim=0)
    above = count_above(supported, null)
    k = options.k or choose_k(values, above)
    return u, {
        "layer": layer,
        "k": k,
        "singular_values": values,
        "statistic": supported.tolist(),
        "null": null.tolist(),
        "above_null": above,
        "gap": gap_after(values, max(k, 1)),
    }


def _check_rank(k: int | None, singular_values: Tensor, where: str) -> None:
    rank = int((singular_values > _ZERO * singular_values[0]).sum())
    if k is not None and k > rank:
        raise ValueError(
            f"k is {k}, but {where} moved along {rank} directions only; choose k ≤ {rank}."
        )


def _no_evidence(finding: Finding, options: Options) -> None:
    finding.reasons.append(
        "That is what unrelated layers give, so there is no evidence of a common direction."
        if options.k is None
        else f"That is what unrelated layers give; k={options.k} directions were asked for."
    )


def _test_gap(finding: Finding, gap: float, k: int | None) -> None:
    which = "The median gap after the chosen directions" if k is None else f"The gap after k = {k}"
    unclear = ", so the number of directions is not clear" if gap < CLEAR_GAP else ""
    finding.reasons.append(
        f"{which} is {gap:.2f}, {beside(gap, CLEAR_GAP)} ({FROM_SMALL_MODELS}){unclear}."
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
        _record_agreement(finding, layers, values, chance)
        hits = [
            layer
            for layer, value in zip(layers, values, strict=True)
            if value > _ABOVE_CHANCE * chance
        ]
    else:
        hits = layers
    _test_reach(finding, hits, layers)


def _record_agreement(
    finding: Finding, layers: list[int], values: list[float], chance: float
) -> None:
    finding.agreement.append({"layers": layers, "values": values, "chance": chance})
    finding.reasons.append(
        f"The top direction of a layer agrees with the others to {median(values):.2f} in the "
        f"median (by chance {chance:.2f})."
    )


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
        if finding.bases is None:
            sentence += ", and k=1 finds the direction along which it moves most"
        finding.reasons.append(f"{sentence}.")


def _bases_like(
    bases: Tensor | dict[int, Tensor], stack: Stack, options: Options
) -> dict[int, Tensor]:
    """What a stack gives by itself in place of `bases`: by layer, -1 for the shared basis."""
    if isinstance(bases, Tensor):
        return {-1: _leading(stack, min(bases.shape[1], *stack.rows.shape), options)[0]}
    own = {}
    for layer, basis in bases.items():
        if layer in stack.layers:
            u = torch.linalg.svd(stack.of_layers([layer]).rows.mT, full_matrices=False)[0]
            own[layer] = u[:, : basis.shape[1]]
    return own
