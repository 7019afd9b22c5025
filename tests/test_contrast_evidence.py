"""Evidence and reasons on contrasts made by hand: `[L, M, D]`, a common mean and noise."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from grasp_kernels.identification.contrast_evidence import directions, measure, reasons, stands_out


def contrasts(strength: float, *, n: int = 40, width: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, n, width, generator=generator)
    return noise + strength * torch.eye(width)[0]


def evidence_of(delta: Tensor, reference: Tensor, scope: str = "layer") -> dict[str, Any]:
    return measure(delta, reference, [0, 1], scope, torch.Generator().manual_seed(2))


def test_noise_does_not_stand_out() -> None:
    evidence = evidence_of(contrasts(0.0), contrasts(0.0, seed=1) / 10)
    assert evidence["ratio"] > 3.3  # so it is the sign-flip null that says no
    assert not stands_out(evidence)


def test_sign_flip_null_is_calibrated() -> None:
    """Pure noise passes the test about as often as the asked p-value says."""
    p_values = [
        evidence_of(contrasts(0.0, seed=seed), contrasts(1.0))["sign_flip"]["p_value"]
        for seed in range(60)
    ]
    assert 0.35 < sum(p_values) / len(p_values) < 0.65
    assert sum(p <= 0.01 for p in p_values) <= 4


@pytest.mark.parametrize(
    ("change", "stands", "failing"),
    [
        ({}, True, None),
        ({"ratio": 3.3}, True, None),
        ({"ratio": 2.5}, True, "2.5 times .*, below 3.3 "),
        ({"ratio": 2.2}, True, "2.2 times .*, below 3.3 "),
        ({"ratio": 2.0}, False, "2.0 times .*, below 2.2 "),
        ({"ratio": None}, True, None),
        ({"halves": 0.7}, True, None),
        ({"halves": 0.5}, True, r"cosine 0.50, below 0.7 \(a threshold from small models\)"),
        (
            {"sign_flip": {"length": 0.9, "null_95": 0.2, "p_value": 0.02}},
            False,
            r"length 0.90, .* up to 0.20 \(p = 0.020, above 0.01\)",
        ),
        (
            {"sign_flip": {"length": 0.0, "null_95": 0.0, "p_value": 1.0}},
            False,
            "are the base model's own answers",
        ),
    ],
)
def test_each_threshold(change: dict[str, Any], stands: bool, failing: str | None) -> None:
    """Every test that fails says so in a sentence of its own, and no other sentence does."""
    strong = evidence_of(contrasts(6.0), contrasts(0.5, seed=1))
    assert strong["ratio"] > 3.3 and strong["halves"] > 0.7
    evidence = {**strong, **change}
    assert stands_out(evidence) == stands
    sentences = reasons(evidence)
    failed = [one for one in sentences if re.search(r", below|, above|own answers$", one)]
    assert len(failed) == (failing is not None)
    assert all(re.search(str(failing), one) for one in failed)
    assert any("harmless trait" in one for one in sentences) == stands
    if evidence["sign_flip"]["length"]:
        assert len(sentences) == 3 + stands


def test_evidence_in_numbers() -> None:
    delta, reference = contrasts(3.0), contrasts(1.0, seed=1)
    evidence = evidence_of(delta, reference)
    ratios = delta.mean(1).norm(dim=1) / reference.mean(1).norm(dim=1)
    assert [row["ratio"] for row in evidence["layers"]] == pytest.approx(ratios.tolist(), rel=1e-4)
    assert evidence["ratio"] == pytest.approx(ratios.mean().item(), rel=1e-4)  # median of two
    first = evidence["spectra"][0]["singular_values"]
    rms = delta[0].square().sum(1).mean().sqrt()
    lead = torch.nn.functional.normalize(delta[0].mean(0), dim=0)
    rest = torch.linalg.svdvals(delta[0] - (delta[0] @ lead).outer(lead)) / math.sqrt(40)
    assert first[0] == pytest.approx(float(delta[0].mean(0).norm() / rms), rel=1e-4)
    assert first[1:] == pytest.approx((rest / rms)[: len(first) - 1].tolist(), rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(delta[0].mean(0), delta[1].mean(0), dim=0)
    assert evidence["agreement"][0]["values"] == pytest.approx([float(cosine)] * 2, rel=1e-4)


def test_directions_are_the_mean_and_then_the_spread() -> None:
    generator = torch.Generator().manual_seed(4)
    delta = torch.randn(30, 10, generator=generator) * torch.tensor([0.1] * 8 + [4.0, 0.1])
    delta[:, 2] += 5.0
    basis = directions(delta, 2)
    rounding = len(basis) * torch.finfo(torch.float64).eps  # of sums of as many numbers
    assert (basis.mT @ basis - torch.eye(2)).abs().max() <= rounding
    assert basis[2, 0] > 0.95
    assert basis[8, 1].abs() > 0.95


def test_directions_need_rank() -> None:
    delta = torch.ones(5, 4)
    assert directions(delta, 1).shape == (4, 1)
    with pytest.raises(ValueError, match="no 2 independent"):
        directions(delta, 2)


def test_shared_scope_has_one_spectrum() -> None:
    by_layer = evidence_of(contrasts(3.0), contrasts(1.0))["spectra"]
    shared = evidence_of(contrasts(3.0), contrasts(1.0), scope="shared")["spectra"]
    assert [record["layer"] for record in by_layer] == [0, 1]
    assert [record["layer"] for record in shared] == [None]
    squares = [record["singular_values"][0] ** 2 for record in by_layer]
    assert shared[0]["singular_values"][0] ** 2 == pytest.approx(sum(squares) / 2)


def test_evidence_is_json_even_without_any_contrast() -> None:
    evidence = evidence_of(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3))
    json.dumps(evidence, allow_nan=False)
    assert evidence["ratio"] is None and not stands_out(evidence)
