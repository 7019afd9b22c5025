"""Two subspaces of one model -> the subspace of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grasp_kernels.identification.weights import agreement
from grasp_kernels.subspace import Subspace, orthonormal

# Singular value of the stacked bases below which two directions count as one: unit vectors with a
# cosine of 0.9999 have 0.01, and what is left of the second one there is rounding and noise.
_SAME_DIRECTION = 1e-2


def unite(first: Subspace, second: Subspace) -> Subspace:
    """Span of both subspaces at every module, with the reasons of both.

    The metadata of each must name its "source"; the evidence of each goes on under that name. Where
    one of the two is empty the other one stands.
    """
    sources = {str(part.metadata["source"]): part for part in (first, second)}
    reasons = [f"{name}: {reason}" for name, part in sources.items() for reason in part.reasons]
    evidence: dict[str, Any] = {"sources": {n: p.evidence for n, p in sources.items()}}
    metadata = {
        "source": " and ".join(sources),
        "sources": {name: part.metadata for name, part in sources.items()},
        "base_model": first.metadata.get("base_model"),
        "model_type": first.metadata.get("model_type"),
    }
    parts = [part for part in sources.values() if not part.is_empty]
    if not parts:
        return Subspace.empty(first.scope, reasons, evidence=evidence, metadata=metadata)
    if len(parts) == 2:
        evidence["agreement_of_sources"] = agreement(first, second)
        reasons.append(
            "the two sources agree with a mean cosine of "
            f"{evidence['agreement_of_sources']:.2f} between their directions"
        )
    streams = [part.stream for part in parts if part.stream is not None]
    stream = span(streams) if len(streams) == len(parts) else None
    bases = _united([(part.bases, part.stream) for part in parts])
    return Subspace(
        bases=bases,
        stream=stream,
        k=max(basis.shape[1] for basis in bases.values()),
        scope="shared" if stream is not None else "layer",
        reasons=tuple(reasons),
        evidence=evidence,
        metadata=metadata,
    )


def _united(parts: list[tuple[dict[str, Tensor], Tensor | None]]) -> dict[str, Tensor]:
    """Union by module; a part without a basis of its own for a writer gives its stream basis."""
    names = dict.fromkeys(name for bases, _ in parts for name in bases)
    spans: dict[tuple[int, ...], Tensor] = {}  # modules that share their bases go on sharing them
    united = {}
    for name in names:
        given = [b for bases, stream in parts if (b := bases.get(name, stream)) is not None]
        key = tuple(id(basis) for basis in given)
        if key not in spans:
            spans[key] = span(given)
        united[name] = spans[key]
    return united


def span(bases: list[Tensor]) -> Tensor:
    """Orthonormal basis `[D, k]` of what the given bases span together."""
    left, values, _ = torch.linalg.svd(torch.cat(bases, dim=1).double(), full_matrices=False)
    return orthonormal("the united bases", left[:, values > _SAME_DIRECTION])
