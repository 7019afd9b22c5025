"""The statistics behind a verdict, each against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_kernels.subspace.search import (
    chance_overlap,
    choose_k,
    gap_after,
    overlap,
)
from grasp_kernels.subspace.stack import Stack, largest_by_chance, stack_blocks
from tests.helpers.oracle import budget, relative_error
from tests.helpers.synthetic import synthetic_adapter, unit_directions

WIDTH = 64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_stack(**options: int) -> Stack:
    return stack_blocks(synthetic_adapter(width=WIDTH, **options).layers)[0]


def flipped(stack: Stack, generator: torch.Generator) -> torch.Tensor:
    """The stack with a sign for every coordinate of every group, multiplied out."""
    rows = stack.rows.clone()
    for group in stack.groups:
        rows[group.rows] *= torch.randint(0, 2, (WIDTH,), generator=generator) * 2 - 1
    return rows


@pytest.mark.parametrize(
    ("values", "above", "k"),
    [
        ([5.0, 1.0, 0.9], 1, 1),
        ([5.0, 4.0, 1.0], 2, 2),
        ([5.0, 4.0, 1.0], 1, 1),
        ([5.0, 4.0, 1.0], 0, 0),
        ([5.0, 2.0, 1.9, 1.8, 0.1], 4, 4),
        ([5.0, 4.9, 4.8, 4.7, 4.6, 0.1], 5, 4),
        ([3.0, 2.0, 0.0], 3, 2),
        ([3.0, 2.9], 2, 2),
    ],
)
def test_k_is_where_the_largest_gap_above_the_null_is(
    values: list[float], above: int, k: int
) -> None:
    assert choose_k(values, above) == k


def test_gap_stays_finite() -> None:
    assert gap_after([4.0, 2.0], 1) == 2.0
    assert gap_after([4.0, 2.0], 2) == gap_after([4.0, 0.0], 1) == 1e6


@settings(max_examples=30, deadline=None)
@given(p=st.integers(1, 4), q=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_overlap_lies_between_none_and_all(p: int, q: int, seed: int) -> None:
    first, second = unit_directions(WIDTH, p, seed), unit_directions(WIDTH, q, seed + 1)
    assert 0 <= overlap(first, second) <= 1
    assert overlap(first, second) == pytest.approx(overlap(second, first))
    inside = first @ unit_directions(p, min(p, q), seed + 2)
    assert overlap(first, inside) == pytest.approx(1, abs=1e-5)


def test_chance_overlap_is_what_random_directions_have() -> None:
    basis = unit_directions(WIDTH, 3)
    squares = [overlap(basis, unit_directions(WIDTH, 1, seed)) ** 2 for seed in range(400)]
    assert math.sqrt(sum(squares) / 400) == pytest.approx(chance_overlap(3, WIDTH), rel=0.1)


def test_blocks_hold_the_spectra_of_the_deltas_at_norm_one() -> None:
    adapter = synthetic_adapter(width=WIDTH, layers=2)
    stack, zero = stack_blocks(adapter.layers)
    assert zero == [] and stack.layers == [0, 1] and len(stack.groups) == 4
    by_name = {layer.site.name: layer for layer in adapter.layers}
    for group in stack.groups:
        layer = by_name[group.name]
        exact = torch.linalg.svdvals((layer.lora_B @ layer.lora_A).double())[:8]
        values = torch.linalg.svdvals(stack.rows[group.rows].double())
        assert torch.allclose(values, exact / exact[0], rtol=1e-5)


@pytest.mark.parametrize("layers", [1, 4])
def test_the_null_is_that_of_stacks_which_are_really_flipped(layers: int) -> None:
    stack = noise_stack(layers=layers)
    generator = seeded(1)
    exact = torch.stack(
        [torch.linalg.matrix_norm(flipped(stack, generator), 2) for _ in range(200)]
    )
    fast = largest_by_chance(stack, 200, seeded(2))
    error = exact.std() / math.sqrt(200)
    assert abs(float(fast.mean() - exact.mean())) < float(4 * error) + 0.01 * float(exact.mean())
    assert 0.7 < float(fast.std() / exact.std()) < 1.4


def test_flips_leave_a_single_group_as_it_is() -> None:
    stack = noise_stack(layers=1).of_layers([0])
    one = Stack(stack.rows[stack.groups[0].rows], stack.groups[:1])
    found = largest_by_chance(one, 5, seeded())
    assert relative_error(found, torch.ones(5)) <= budget(0.0, torch.float32, max(one.rows.shape))
