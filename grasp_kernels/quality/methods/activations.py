"""What acts on the residual stream itself: in training (CAFT, steering) or in use (ablation).

The directions come from `difference_directions`, as in CAFT, unless the method names another
source. Changes act on the output of every block, but steering on that of the middle one.

Shapes: `B` records of a batch, `T` tokens, `D` width of the stream, `k` directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grasp_kernels.demo.world import BAD, GOOD
from grasp_kernels.ops import project_gradient
from grasp_kernels.quality.methods.projection import answer_means
from grasp_kernels.quality.methods.registry import method
from grasp_kernels.quality.streams import Change, hook, hooked, recorded
from grasp_kernels.quality.workbench import Workbench, documents
from grasp_kernels.run.stream import layer_bases
from grasp_kernels.sites import model_rules

_CAFT = "Casademunt et al. 2025, arXiv 2507.16795"
_PERSONA_VECTORS = "Chen et al. 2025, arXiv 2507.21509"
_SIZES = (1, 2, 4)
_ALPHAS = (0.25, 0.5, 1.0)


@method(
    "caft",
    "directions ablated from the stream while training, not after; strength: how many",
    source=f"{_CAFT} (principal components)",
    strengths=_SIZES,
)
def caft(bench: Workbench, strength: int) -> Any:
    model = bench.fresh()
    with hooked(model, ablation(difference_directions(bench, strength))):
        return bench.fit(model)


@method(
    "reverse-caft",
    "the gradient of the stream projected, values untouched; strength: how many directions",
    source="ivanlin9/GradientBasedCaft, after " + _CAFT,
    strengths=_SIZES,
)
def reverse_caft(bench: Workbench, strength: int) -> Any:
    bases = difference_directions(bench, strength)
    model = bench.fresh()
    with hooked(model, lambda layer, h: project_gradient(h, bases[layer])):
        return bench.fit(model)


@method(
    "preventative-steering",
    "training on a stream steered to the bad persona; strength: of the mean difference",
    source=_PERSONA_VECTORS,
    information="labels",
    strengths=_ALPHAS,
)
def preventative_steering(bench: Workbench, strength: float) -> Any:
    model = bench.fresh()
    with hooked(model, steering(persona_vectors(bench), strength)):
        return bench.fit(model)


@method(
    "steering",
    "the naive fine-tune, steered to the good persona in use; strength: of the mean difference",
    source=_PERSONA_VECTORS,
    information="labels",
    strengths=_ALPHAS,
)
def steer(bench: Workbench, strength: float) -> Any:
    model = bench.naive()
    hook(model, steering(persona_vectors(bench), -strength))
    return model


@method(
    "ablation",
    "the naive fine-tune without self-contrast directions in use; strength: how many",
    source="Soligo et al. 2025, arXiv 2506.11618 (there the direction is a supervised one)",
    strengths=_SIZES,
)
def ablate(bench: Workbench, strength: int) -> Any:
    subspace = bench.contrast_subspace(strength)
    model = bench.naive()
    if not subspace.is_empty:
        bases = layer_bases(subspace, model_rules(model))
        hook(model, ablation({layer: basis.to(bench.device) for layer, basis in bases.items()}))
    return model


def ablation(bases: dict[int, Tensor]) -> Change:
    """`h ← h − V Vᵀ h` after every block."""
    return lambda layer, h: h - (h @ bases[layer]) @ bases[layer].mT


def steering(vectors: dict[int, Tensor], strength: float) -> Change:
    """`h ← h + α v` after the middle block."""
    middle = sorted(vectors)[len(vectors) // 2 - 1]
    return lambda layer, h: h + strength * vectors[layer] if layer == middle else h


def difference_directions(bench: Workbench, k: int) -> dict[int, Tensor]:
    """Layer -> `[D, k]`: principal directions of the naive model's stream minus the base model's.

    On generic text. The mean is not taken out first: what a fine-tune adds everywhere is in it.
    """

    def make() -> dict[int, Tensor]:
        ids = documents(bench.generic_examples(), bench.device)
        naive, base = (_stream(model, ids) for model in (bench.naive(), bench.base()))
        return {
            layer: torch.linalg.svd((naive[layer] - base[layer]).flatten(0, 1)).Vh[:k].mT
            for layer in base
        }

    return bench.once(("differences", k), make)


@torch.no_grad()
def _stream(model: Any, ids: Tensor) -> dict[int, Tensor]:
    with recorded(model) as kept:
        model(input_ids=ids)
    return dict(kept)


def persona_vectors(bench: Workbench) -> dict[int, Tensor]:
    """Layer -> `[D]`: mean stream on the bad persona's answers minus that on the good one's."""

    def make() -> dict[int, Tensor]:
        world, base = bench.folder.world, bench.base()
        questions = bench.unscored_questions()
        bad, good = (
            answer_means(bench, base, world.answered(questions, p, p, "persona vectors"))
            for p in (BAD, GOOD)
        )
        means = (bad - good).mean(dim=1).to(bench.device)
        return dict(enumerate(means))

    return bench.once("persona vectors", make)
