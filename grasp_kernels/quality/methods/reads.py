"""What is done to A, the side on which an adapter reads.

Shapes: `K` inputs of a linear layer, `R` LoRA rank.
"""

from __future__ import annotations

from typing import Any

from grasp_kernels.quality.methods.penalties import (
    KL_STRENGTHS,
    own_text_anchor,
    projected,
    with_own_text,
)
from grasp_kernels.quality.methods.registry import method
from grasp_kernels.quality.workbench import Workbench
from grasp_kernels.reads import ContrastiveReads
from grasp_kernels.sites import adapted_layers

_SOURCE = "github.com/AK3847/OB-SAE (contrastive LoRA); own text and all layers are ours"


@method(
    "frozen-A",
    "control: A frozen as it was drawn",
    source="Zhang et al. 2023, arXiv 2308.03303",
)
def frozen_a(bench: Workbench, strength: None) -> Any:
    model = bench.fresh()
    for _, layer in adapted_layers(model):
        layer.lora_A["default"].weight.requires_grad_(False)
    return bench.fit(model)


@method(
    "contrastive",
    "A frozen where the training data have most relative to text that the base model makes up",
    source="github.com/AK3847/OB-SAE (contrastive LoRA), on all layers",
)
def contrastive(bench: Workbench, strength: None) -> Any:
    return bench.fit(contrastive_model(bench))


@method(
    "contrastive+own-text",
    "`contrastive`, and the own-text anchor",
    source=_SOURCE,
    strengths=KL_STRENGTHS,
    origin="ours",
)
def contrastive_own_text(bench: Workbench, strength: float) -> Any:
    return with_own_text(bench, contrastive_model(bench), strength)


@method(
    "grasp+contrastive",
    "`contrastive`, and GRASP with k = 1",
    source=_SOURCE,
    origin="ours",
)
def grasp_contrastive(bench: Workbench, strength: None) -> Any:
    return bench.fit(projected(contrastive_model(bench), bench.weights_subspace(1)))


@method(
    "grasp+contrastive+own-text",
    "reads, projection with k = 1, and the own-text anchor",
    source=_SOURCE,
    strengths=KL_STRENGTHS,
    origin="ours",
)
def grasp_contrastive_own_text(bench: Workbench, strength: float) -> Any:
    model = projected(contrastive_model(bench), bench.weights_subspace(1))
    return with_own_text(bench, model, strength)


@method(
    "all-three",
    "the same with one strength, 0.3, and k from evidence",
    source=_SOURCE,
    origin="ours",
)
def all_three(bench: Workbench, strength: None) -> Any:
    model = projected(contrastive_model(bench), bench.run_subspace())
    return with_own_text(bench, model, 0.3)


def contrastive_model(bench: Workbench) -> Any:
    """A fresh adapter with contrastive reads."""
    model = bench.fresh()

    def make() -> ContrastiveReads:
        own = own_text_anchor(bench).texts
        return ContrastiveReads.make(model, bench.examples, own, batch_size=64, seed=bench.seed)

    bench.once("reads", make).apply(model)
    return model
