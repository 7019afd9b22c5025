"""Is there anything common to the contrasts of many records, and more than chance would give?

Shapes: `M` records, `L` blocks, `D` residual width, `k` directions, `F` sign flips.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.identification.evidence import FROM_SMALL_MODELS, beside

FLIPS = 999  # smallest p-value 0.001, a tenth of what is asked for
MAX_P_VALUE = 0.01

# Norm of the mean contrast, relative to the same between sampled and greedy answers of the base
# model. In trials with a planted factor: 12.6 to 22.9 with a persona, 3.3 to 8.9 with a political
# slant, 1.2 to 2.1 with benign answers. The sign-flip null alone takes the benign ones for a find.
# In the world of the demo (seeds 0 to 2): 13.9 to 20.8 when every answer is in the bad persona, 2.5
# to 4.1 when a fifth is, 0.6 to 0.9 when none is; few records make it large, but not significant.
PLANTED_RATIO = 3.3
BENIGN_RATIO = 2.2

# Cosine of the directions from two disjoint halves of the records; directions that proved useful
# had .7 and more in those trials.
CLEAR_AGREEMENT = 0.7

_SPECTRUM = 12  # values that are kept of each spectrum


def measure(
    delta: Tensor,
    reference: Tensor,
    layers: list[int],
    scope: str,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Everything that `stands_out` and `reasons` rest on, JSON-able.

    Lengths are relative to the root mean square length of the contrasts of a layer, so 1 means that
    all records differ from the base model's answers in the same way.

    Args:
        delta, reference: contrasts `[L, M, D]` of the training answers and of sampled answers.

    Returns:
        spectra, agreement: as `Subspace` documents them; the first singular value is the length of
            the mean, its null comes from random signs of the records; the others are without null.
        records: number of records.
        ratio: median over layers of ‖mean delta‖ / ‖mean reference‖; None where the sampled answers
            are the greedy ones, so that there is nothing to compare with.
        sign_flip: length (root mean square over layers), null_95, p_value, flips.
        halves: median over layers of the cosine between the means of two disjoint halves.
        layers: for each layer: layer, norm, reference_norm, ratio, halves.
    """
    n_layers, n_records, _ = delta.shape
    signs = _random_signs(n_records, generator)
    first = torch.randperm(n_records, generator=generator, device=generator.device).cpu()
    halves = (first[: n_records // 2], first[n_records // 2 :])
    lengths, spectra, nulls, rows = [], [], [], []
    for layer, contrast, sampled in zip(layers, delta, reference, strict=True):
        contrast = contrast.double()
        gram = contrast @ contrast.mT
        scale = max(gram.trace().item() / n_records, torch.finfo(torch.float64).tiny)
        flipped = ((signs @ gram) * signs).sum(dim=1) / n_records**2 / scale  # [F]
        mean = contrast.mean(dim=0)
        lengths.append(mean.square().sum().item() / scale)
        nulls.append(flipped)
        spectra.append(_remaining(contrast, gram, mean) / (n_records * scale))
        norm, base = mean.norm().item(), sampled.double().mean(dim=0).norm().item()
        rows.append(
            {
                "layer": layer,
                "norm": norm,
                "reference_norm": base,
                "ratio": norm / base if base else None,
                "halves": _cosine(*(contrast[half].mean(dim=0) for half in halves)),
            }
        )
    length, null = sum(lengths) / n_layers, torch.stack(nulls).mean(dim=0)
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    if scope == "shared":
        records = [_spectrum(None, length, torch.stack(spectra).mean(dim=0), null)]
    else:
        columns = zip(layers, lengths, spectra, nulls, strict=True)
        records = [_spectrum(*column) for column in columns]
    return {
        "spectra": records,
        "agreement": [_neighbours(delta.double().mean(dim=1), layers)] if n_layers > 1 else [],
        "records": n_records,
        "ratio": median(ratios) if ratios else None,
        "sign_flip": {
            "length": length**0.5,
            "null_95": null.quantile(0.95).sqrt().item(),
            "p_value": (1 + int((null >= length).sum())) / (1 + FLIPS),
            "flips": FLIPS,
        },
        "halves": median(row["halves"] for row in rows),
        "layers": rows,
    }


def stands_out(evidence: dict[str, Any]) -> bool:
    """Whether the training answers differ in one way from the base model's own, by more than random
    signs and benign answers give; from what `measure` returned."""
    flip, ratio = evidence["sign_flip"], evidence["ratio"]
    significant = flip["length"] > 0 and flip["p_value"] <= MAX_P_VALUE
    return significant and (ratio is None or ratio >= BENIGN_RATIO)


def reasons(evidence: dict[str, Any]) -> list[str]:
    """What each test gave, one sentence each, from what `measure` returned."""
    flip, ratio, halves = evidence["sign_flip"], evidence["ratio"], evidence["halves"]
    if flip["length"] == 0:
        return ["the training answers are the base model's own answers"]
    level = "at most" if flip["p_value"] <= MAX_P_VALUE else "above"
    found = [
        f"over {evidence['records']} records the training answers differ from the base model's own "
        f"by a mean of length {flip['length']:.2f}, where random signs give up to "
        f"{flip['null_95']:.2f} (p = {flip['p_value']:.3f}, {level} {MAX_P_VALUE})"
    ]
    if ratio is None:
        found.append(
            "sampled answers of the base model are its greedy ones, so it never strays by itself"
        )
    else:
        nearest = BENIGN_RATIO if ratio < BENIGN_RATIO else PLANTED_RATIO
        found.append(
            f"that mean is {ratio:.1f} times the one between sampled and greedy answers of the "
            f"base model, {beside(ratio, nearest)} (on small models {PLANTED_RATIO} and more with "
            f"a planted factor, less than {BENIGN_RATIO} with benign answers)"
        )
    found.append(
        f"the means of two halves of the records have cosine {halves:.2f}, "
        f"{beside(halves, CLEAR_AGREEMENT)} ({FROM_SMALL_MODELS})"
    )
    if stands_out(evidence):
        found.append(
            "a harmless trait of all answers, such as their format, would look the same: see which "
            "tokens the direction promotes"
        )
    return found


def directions(delta: Tensor, k: int) -> Tensor:
    """Orthonormal `[D, k]` of contrasts `[M, D]`: the mean, then singular directions of the rest.

    Raises:
        ValueError: the contrasts have fewer than `k` independent directions.
    """
    delta = delta.double()
    mean = delta.mean(dim=0)
    lead = mean / mean.norm()
    rest = delta - (delta @ lead).outer(lead)
    values, vectors = torch.linalg.eigh(rest @ rest.mT)  # ascending; M×M, whatever the width
    values, vectors = values.flip(0)[: k - 1], vectors.flip(1)[:, : k - 1]
    scale = delta.square().sum()
    if len(values) < k - 1 or bool((values < 1e-12 * scale).any()):
        raise ValueError(
            f"k is {k}, but the contrasts of the {len(delta)} records have no {k} independent "
            "directions: give a smaller k or more records."
        )
    return torch.cat([lead[:, None], rest.mT @ vectors / values.sqrt()], dim=1)


def _random_signs(n_records: int, generator: torch.Generator) -> Tensor:
    """`[F, M]` of ±1."""
    shape = (FLIPS, n_records)
    bits = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return (2 * bits - 1).cpu().double()


def _remaining(contrast: Tensor, gram: Tensor, mean: Tensor) -> Tensor:
    """Leading squared singular values of the contrasts `[M, D]` without their mean direction."""
    along = contrast @ (mean / mean.norm().clamp_min(torch.finfo(torch.float64).tiny))
    values = torch.linalg.eigvalsh(gram - along.outer(along)).flip(0).clamp_min(0)
    return values[: _SPECTRUM - 1]


def _spectrum(layer: int | None, length: float, rest: Tensor, null: Tensor) -> dict[str, Any]:
    """One entry of `spectra`; squared lengths come in, lengths go out."""
    values = [length**0.5, *rest.sqrt().tolist()]
    return {
        "layer": layer,
        "k": 0,
        "singular_values": values,
        "null": [null.quantile(0.95).sqrt().item()],
        "gap": values[0] / max(values[1], 1e-6),
    }


def _neighbours(means: Tensor, layers: list[int]) -> dict[str, Any]:
    """For each layer the mean cosine of its direction with those of the layers next to it."""
    steps = [_cosine(a, b) for a, b in pairwise(means)]
    beside = [steps[max(i - 1, 0) : i + 1] for i in range(len(layers))]
    values = [sum(cosines) / len(cosines) for cosines in beside]
    return {
        "layers": layers,
        "values": values,
        "chance": means.shape[1] ** -0.5,
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()
