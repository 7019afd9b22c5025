"""GRASP through the public API, in its variants, and the controls of its subspace.

Shapes: `D` width of the stream, `k` directions, `M` records, `C` columns of a stack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grasp_kernels.adapters import load_adapter
from grasp_kernels.data import Record, split_first_answer
from grasp_kernels.demo.world import BAD, GOOD
from grasp_kernels.identification import identify, unite
from grasp_kernels.identification.contrast_evidence import directions
from grasp_kernels.identification.frozen_model import stream_means
from grasp_kernels.identification.stack import stack_blocks
from grasp_kernels.layers.replacement import replace_lora_layers
from grasp_kernels.ops import project_gradient
from grasp_kernels.quality.methods.registry import method
from grasp_kernels.quality.streams import blocks_of, hooked
from grasp_kernels.quality.workbench import Workbench
from grasp_kernels.run.stream import layer_bases
from grasp_kernels.sites import model_rules, model_sites
from grasp_kernels.subspace import Subspace

_PAPER = "Gilligan-Lee et al. 2026, arXiv 2605.27676; side, layers and k are ours"
_SIZES = (1, 2, 4)
_MORE_SIZES = (*_SIZES, 8)  # where four have been the best of three
_USAGE_POWERS = tuple(p / 4 for p in range(17))
_BATCH_SIZE = 64


def retrain(bench: Workbench, subspace: Subspace, **options: Any) -> Any:
    """A fresh adapter, trained under a subspace; without a subspace the naive one stands."""
    if subspace.is_empty:
        return bench.naive()
    model = bench.fresh()
    replace_lora_layers(model, subspace, **options)
    return bench.fit(model)


@method(
    "grasp",
    "k from evidence, as in `grasp-kernels run`; without evidence the naive fine-tune stands",
    source=_PAPER,
    origin="ours",
)
def grasp(bench: Workbench, strength: None) -> Any:
    return retrain(bench, bench.weights_subspace("auto"))


@method(
    "grasp-k",
    "with a given number of directions",
    source=_PAPER,
    strengths=_MORE_SIZES,
    origin="ours",
)
def grasp_k(bench: Workbench, strength: int) -> Any:
    return retrain(bench, bench.weights_subspace(strength))


@method(
    "grasp-layer",
    "with a basis for each layer",
    source=_PAPER,
    strengths=_SIZES,
    origin="ours",
)
def grasp_layer(bench: Workbench, strength: int) -> Any:
    return retrain(bench, bench.weights_subspace(strength, scope="layer"))


@method(
    "grasp-open",
    "gradient projected, adapter not closed",
    source=_PAPER,
    strengths=_SIZES,
    origin="ours",
)
def grasp_open(bench: Workbench, strength: int) -> Any:
    return retrain(bench, bench.weights_subspace(strength), closed=False)


@method(
    "grasp-weights",
    "only the adapter's own gradients projected",
    source=_PAPER,
    strengths=_SIZES,
    origin="ours",
)
def grasp_weights(bench: Workbench, strength: int) -> Any:
    return retrain(bench, bench.weights_subspace(strength), project="weights")


@method(
    "grasp-both-sides",
    "readers and writers",
    source=_PAPER,
    strengths=_MORE_SIZES,
    origin="ours",
)
def grasp_both_sides(bench: Workbench, strength: int) -> Any:
    return retrain(bench, bench.weights_subspace(strength, side="both"))


@method(
    "self-contrast",
    "GRASP with directions from self-contrast",
    strengths=_SIZES,
    origin="ours",
)
def self_contrast(bench: Workbench, strength: int) -> Any:
    return retrain(bench, bench.contrast_subspace(strength))


@method(
    "self-contrast-stream",
    "the same, projected on the block outputs",
    strengths=_SIZES,
    origin="ours",
)
def self_contrast_stream(bench: Workbench, strength: int) -> Any:
    return retrain_stream(bench, bench.contrast_subspace(strength))


@method(
    "both-sources",
    "GRASP with weights and self-contrast together",
    strengths=_SIZES,
    origin="ours",
)
def both_sources(bench: Workbench, strength: int) -> Any:
    united = unite(bench.weights_subspace(strength), bench.contrast_subspace(strength))
    return retrain(bench, united)


@method(
    "supervised",
    "labels: directions between the answers of both personas",
    information="labels",
    strengths=_SIZES,
    origin="control",
)
def supervised(bench: Workbench, strength: int) -> Any:
    return retrain(bench, supervised_subspace(bench, strength))


@method(
    "benign-twin",
    "control: directions from a fine-tune on the good persona's answers to the same questions",
    information="labels",
    strengths=_SIZES,
    origin="control",
)
def benign_twin(bench: Workbench, strength: int) -> Any:
    *early, _ = bench.twin_folders()
    return retrain(bench, identify([str(folder) for folder in early], k=strength))


@method(
    "random",
    "control: a random subspace",
    strengths=_SIZES,
    origin="control",
)
def random(bench: Workbench, strength: int) -> Any:
    sites = model_sites(bench.base())
    width = bench.base().config.hidden_size
    drawn = torch.randn(width, strength, generator=bench.generator("random subspace"))
    return retrain(bench, Subspace.from_stream(drawn, sites))


@method(
    "random-used",
    "control: random directions that the naive adapter uses as much as those of GRASP",
    strengths=_SIZES,
    origin="control",
)
def random_used(bench: Workbench, strength: int) -> Any:
    found = bench.weights_subspace(strength).stream
    assert found is not None  # a shared basis
    adapters = [load_adapter(folder) for folder in bench.naive_folders()[:-1]]
    writers = [w for adapter in adapters for w in adapter.layers if w.site.role == "write"]
    stack, _ = stack_blocks(writers)
    drawn = torch.randn(len(found), strength, generator=bench.generator("used subspace"))
    basis = as_used(stack.rows.mT.double(), found.double(), drawn.double())
    return retrain(bench, Subspace.from_stream(basis, model_sites(bench.base())))


def as_used(stack: Tensor, found: Tensor, drawn: Tensor) -> Tensor:
    """Random directions `[D, k]` orthogonal to those found, used nearly as much as they are.

    Usage of a basis is `‖Vᵀ M‖ / ‖M‖` for the stack `M[D, C]` of an adapter's writes. Powers of
    `M Mᵀ` pull random directions towards what is used; the power that comes nearest is taken.
    """
    outside = stack - found @ (found.mT @ stack)
    values, vectors = torch.linalg.eigh(outside @ outside.mT)
    values = values.clamp_min(0) / values.max()
    target = usage(stack, found)
    candidates = []
    for power in _USAGE_POWERS:
        pulled = vectors @ (values.pow(power)[:, None] * (vectors.mT @ drawn))
        candidates.append(torch.linalg.qr(pulled - found @ (found.mT @ pulled)).Q)
    return min(candidates, key=lambda basis: abs(usage(stack, basis) - target))


def usage(stack: Tensor, basis: Tensor) -> float:
    """Part of a stack `[D, C]` that lies in a basis `[D, k]`, by norm."""
    return (basis.mT @ stack).norm().item() / stack.norm().item()


def retrain_stream(bench: Workbench, subspace: Subspace) -> Any:
    """Retrain with the gradient projected on block outputs: nothing below learns through it."""
    if subspace.is_empty:
        return bench.naive()
    model = bench.fresh()
    replace_lora_layers(model, subspace, project="weights")
    bases = {
        layer: basis.to(bench.device)
        for layer, basis in layer_bases(subspace, model_rules(model)).items()
    }
    with hooked(model, lambda layer, h: project_gradient(h, bases[layer])):
        return bench.fit(model)


def supervised_subspace(bench: Workbench, k: int) -> Subspace:
    """For each layer the mean difference of the stream between the personas' answers, then more.

    Each answers the unscored questions of untouched topics under its own cue.
    """
    base = bench.base()
    world = bench.folder.world
    questions = bench.unscored_questions()

    def stream(persona: str) -> Tensor:
        records = world.answered(questions, persona, persona, "supervised")
        return answer_means(bench, base, records)

    delta = stream(BAD) - stream(GOOD)  # [L, M, D]
    found = {layer: directions(part, k) for layer, part in zip(blocks_of(base), delta, strict=True)}
    return Subspace.from_stream(found, model_sites(base))


def answer_means(bench: Workbench, base: Any, records: list[Record]) -> Tensor:
    """Mean stream `[L, M, D]` over the answer of each record and the token before it."""
    parts = [split_first_answer(record, bench.tokenizer) for record in records]
    return stream_means(
        base,
        blocks_of(base),
        [prompt + answer for prompt, answer in parts],
        [(len(prompt) - 1, len(prompt) + len(answer)) for prompt, answer in parts],
        batch_size=_BATCH_SIZE,
    )
