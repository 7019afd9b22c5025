"""Two subspaces of a model as one. `D` residual width, `k` directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp_kernels.identification import span, unite
from grasp_kernels.sites import RULES
from grasp_kernels.subspace import Subspace

WIDTH = 12
SITES = tuple(RULES["llama"].sites("model.layers", range(3)))


def directions(n: int) -> Tensor:
    """`[D, n]`, orthonormal, seeded by conftest."""
    return torch.linalg.qr(torch.randn(WIDTH, n))[0]


def contained(small: Tensor, large: Tensor) -> bool:
    return torch.allclose(large @ (large.T @ small), small, atol=1e-5)


def test_union_holds_both_at_every_writer() -> None:
    basis = directions(4)
    shared = Subspace.from_stream(
        basis[:, :1], SITES, reasons=["gap"], metadata={"source": "weights"}
    )
    layers = {0: basis[:, 1:3], 1: basis[:, :1], 2: basis[:, 3:]}
    layered = Subspace.from_stream(
        layers, SITES, reasons=["norm"], metadata={"source": "self-contrast"}
    )
    united = unite(shared, layered)
    for site in SITES:
        if site.role == "write":
            assert contained(basis[:, :1], united.bases[site.name])
            assert contained(layers[site.layer], united.bases[site.name])
    assert [united.bases[f"model.layers.{i}.mlp.down_proj"].shape[1] for i in range(3)] == [3, 1, 2]
    assert (united.k, united.scope, united.stream) == (3, "layer", None)
    assert united.reasons[:2] == ("weights: gap", "self-contrast: norm")
    assert 0 <= united.evidence["agreement_of_sources"] <= 1


def test_union_of_shared_subspaces_is_shared() -> None:
    basis = directions(2)
    parts = [
        Subspace.from_stream(column, SITES, metadata={"source": source})
        for source, column in zip(("a", "b"), basis.split(1, dim=1), strict=True)
    ]
    united = unite(*parts)
    assert (united.k, united.scope) == (2, "shared")
    assert united.stream is not None
    assert contained(basis, united.stream)


@pytest.mark.parametrize("empty_first", [True, False])
def test_empty_source_leaves_the_other(empty_first: bool) -> None:
    found = Subspace.from_stream(directions(1), SITES, metadata={"source": "a"})
    empty = Subspace.empty("layer", ["no norm"], metadata={"source": "b"})
    united = unite(empty, found) if empty_first else unite(found, empty)
    name = "model.layers.1.self_attn.o_proj"
    assert contained(found.bases[name], united.bases[name])
    assert united.k == 1
    assert "b: no norm" in united.reasons
    assert "agreement_of_sources" not in united.evidence


def test_two_empty_sources_stay_empty() -> None:
    parts = [Subspace.empty("layer", ["no"], metadata={"source": source}) for source in "ab"]
    united = unite(*parts)
    assert united.is_empty and united.reasons == ("a: no", "b: no")


def test_same_direction_counts_once() -> None:
    basis = directions(2)
    nearly = basis[:, :1] + 1e-3 * basis[:, 1:]
    assert span([basis[:, :1], nearly / nearly.norm()]).shape == (WIDTH, 1)
    assert span([basis[:, :1], -basis[:, :1], basis[:, 1:]]).shape == (WIDTH, 2)
