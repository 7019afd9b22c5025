"""How much two subspaces of one model agree."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import RULE, unit_directions

from grasp_kernels.identification import agreement
from grasp_kernels.subspace import Subspace

WIDTH = 128


@settings(max_examples=30, deadline=None)
@given(degrees=st.floats(0, 90), extra=st.booleans())
def test_agreement_is_the_cosine_between_directions(degrees: float, extra: bool) -> None:
    a, b, c = unit_directions(WIDTH, 3).mT
    angle = math.radians(degrees)
    turned = math.cos(angle) * a + math.sin(angle) * b
    other = torch.stack([turned, c], dim=1) if extra else turned[:, None]
    sites = list(RULE.sites("model.layers", range(2)))
    first, second = (Subspace.from_stream(basis, sites) for basis in (a[:, None], other))
    assert agreement(first, second) == pytest.approx(math.cos(angle), abs=1e-5)
    assert agreement(second, first) == pytest.approx(math.cos(angle), abs=1e-5)


def test_agreement_averages_over_common_modules() -> None:
    a, b = unit_directions(WIDTH, 2).mT
    sites = list(RULE.sites("model.layers", range(4)))
    first = Subspace.from_stream({0: a, 1: a, 3: b}, sites)
    second = Subspace.from_stream({0: a, 1: b, 2: a}, sites)
    assert agreement(first, second) == pytest.approx(0.5, abs=1e-5)


def test_agreement_needs_something_in_common() -> None:
    nothing = Subspace.empty("shared", [])
    with pytest.raises(ValueError, match="no module in common"):
        agreement(nothing, nothing)
