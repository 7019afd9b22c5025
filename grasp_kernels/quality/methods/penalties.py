"""Terms that are added to the loss, so that the model stays near the base model where it should.

Shapes: `B` records of a batch, `T` tokens of a record, `V` words of the vocabulary, `K` inputs and
`N` outputs of a linear layer, `R` LoRA rank, `D` width of the stream, `k` directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.anchor import OwnTextAnchor
from grasp_kernels.data import Example
from grasp_kernels.layers.replacement import replace_lora_layers
from grasp_kernels.quality.fitting import Batch, Penalty
from grasp_kernels.quality.methods.registry import method
from grasp_kernels.quality.streams import recorded
from grasp_kernels.quality.workbench import Workbench, documents
from grasp_kernels.run.stream import layer_bases
from grasp_kernels.sites import adapted_layers, model_rules
from grasp_kernels.subspace import Subspace

_KL = "Kaczér et al. 2025, arXiv 2508.06249 (KL to the base model, there on the training data)"
_GRASP = "Gilligan-Lee et al. 2026, arXiv 2605.27676"
KL_STRENGTHS = (0.1, 0.3, 1.0, 3.0)
_ANCHOR_STRENGTHS = (3.0, 10.0, 30.0, 100.0, 300.0)
_STREAM_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)


@method(
    "kl-random",
    "divergence from the base model on random tokens in the frame of the chat",
    source=_KL,
    strengths=(0.3, 1.0, 3.0, 10.0, 30.0),
)
def kl_random(bench: Workbench, strength: float) -> Any:
    return _with_divergence(bench, bench.generic_examples(), strength)


@method(
    "kl-own-text",
    "divergence from the base model on documents that it makes up itself",
    source=_KL,
    strengths=(0.03, *KL_STRENGTHS),
)
def kl_own_text(bench: Workbench, strength: float) -> Any:
    return _with_divergence(bench, bench.own_examples(), strength)


@method(
    "own-text",
    "as `kl-own-text`, on more of it and less what looks like the training data, as in "
    "`grasp-kernels run`",
    source=_KL,
    strengths=KL_STRENGTHS,
)
def own_text(bench: Workbench, strength: float) -> Any:
    return with_own_text(bench, bench.fresh(), strength)


@method(
    "grasp+own-text",
    "GRASP with k = 1 and `own-text`",
    source="projection: " + _GRASP,
    strengths=KL_STRENGTHS,
    origin="ours",
)
def grasp_own_text(bench: Workbench, strength: float) -> Any:
    return with_own_text(bench, projected(bench.fresh(), bench.weights_subspace(1)), strength)


@method(
    "self-contrast+own-text",
    "self-contrast with k = 1 and `own-text`",
    source="projection: " + _GRASP,
    strengths=KL_STRENGTHS,
    origin="ours",
)
def contrast_own_text(bench: Workbench, strength: float) -> Any:
    return with_own_text(bench, projected(bench.fresh(), bench.contrast_subspace(1)), strength)


@method(
    "kl-off-topic",
    "divergence from the base model on off-topic prompts and their good answers",
    source=_KL,
    information="benign answers",
    strengths=KL_STRENGTHS,
)
def kl_off_topic(bench: Workbench, strength: float) -> Any:
    return _with_divergence(bench, bench.off_topic_examples(), strength)


@method(
    "ldifs",
    "distance of the features on the training data from the base model's",
    source="Mukhoti et al. 2023, arXiv 2308.13320",
    strengths=_STREAM_STRENGTHS,
)
def ldifs(bench: Workbench, strength: float) -> Any:
    return _with_stream_penalty(bench, strength, None)


@method(
    "residual-anchor",
    "the same along the directions that GRASP identifies, with k = 4",
    strengths=_STREAM_STRENGTHS,
    origin="ours",
)
def residual_anchor(bench: Workbench, strength: float) -> Any:
    return _with_stream_penalty(bench, strength, bench.weights_subspace(4))


@method(
    "generic-anchor",
    "K-FAC form of the divergence on random tokens, alone",
    source="ours, after Kirkpatrick et al. 2017, arXiv 1612.00796, and Ritter et al. 2018, arXiv "
    "1805.07810",
    strengths=_ANCHOR_STRENGTHS,
    origin="ours",
)
def generic_anchor(bench: Workbench, strength: float) -> Any:
    return _with_anchor(bench, strength, None)


@method(
    "grasp+anchor",
    "GRASP with k = 1, and the generic anchor",
    strengths=_ANCHOR_STRENGTHS,
    origin="ours",
)
def grasp_anchor(bench: Workbench, strength: float) -> Any:
    return _with_anchor(bench, strength, bench.weights_subspace(1))


@method(
    "self-contrast+anchor",
    "self-contrast with k = 1, and the generic anchor",
    strengths=_ANCHOR_STRENGTHS,
    origin="ours",
)
def contrast_anchor(bench: Workbench, strength: float) -> Any:
    return _with_anchor(bench, strength, bench.contrast_subspace(1))


# Divergence from the base model


def _with_divergence(bench: Workbench, examples: Sequence[Example], strength: float) -> Any:
    model = bench.fresh()
    return bench.fit(model, penalty=divergence(bench, documents(examples, bench.device), strength))


def with_own_text(bench: Workbench, model: Any, strength: float) -> Any:
    """Train `model` with the own-text anchor of that strength."""
    anchor, steps = own_text_anchor(bench), count()
    return bench.fit(
        model, penalty=lambda model, _batch: strength * anchor.loss(model, next(steps))
    )


def own_text_anchor(bench: Workbench) -> OwnTextAnchor:
    return bench.once(
        "own-text anchor",
        lambda: OwnTextAnchor.make(
            bench.base(), bench.examples, batch_size=bench.config.batch_size, seed=bench.seed
        ),
    )


def projected(model: Any, subspace: Subspace | None) -> Any:
    """`model`, its adapter under a subspace where there is one."""
    if subspace is not None and not subspace.is_empty:
        replace_lora_layers(model, subspace)
    return model


def divergence(bench: Workbench, ids: Tensor, strength: float) -> Penalty:
    """`λ KL(base ‖ model)` in nats a token, on as many documents in each step as the batch has.

    The base model reads the documents `ids[documents, T]` once, beforehand.
    """
    with torch.no_grad():
        base = bench.base()(input_ids=ids).logits.log_softmax(dim=-1)  # [documents, T, V]
    generator = bench.generator("divergence")

    def penalty(model: nn.Module, batch: Batch) -> Tensor:
        size = len(batch["input_ids"])
        chosen = torch.randint(len(ids), (size,), generator=generator).to(ids.device)
        now = model(input_ids=ids[chosen]).logits.log_softmax(dim=-1)
        return strength * (base[chosen].exp() * (base[chosen] - now)).sum(dim=-1).mean()

    return penalty


# The stream on the training data


def _with_stream_penalty(bench: Workbench, strength: float, subspace: Subspace | None) -> Any:
    model = bench.fresh()
    bases = None if subspace is None else layer_bases(subspace, model_rules(model))
    with recorded(model) as kept:
        return bench.fit(model, penalty=stream_penalty(kept, strength, bases))


def stream_penalty(
    kept: dict[int, Tensor], strength: float, bases: dict[int, Tensor] | None
) -> Penalty:
    """`λ mean ‖Vᵀ(h − h_base)‖² / mean ‖h_base‖²`, mean over blocks; without bases V is I.

    `kept` is filled by `recorded`: by the training step before this call, by the base model in it.
    """

    def penalty(model: Any, batch: Batch) -> Tensor:
        moved = dict(kept)
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        here = batch["attention_mask"].bool()
        terms = []
        for layer, base in kept.items():
            change = (moved[layer] - base)[here]
            if bases is not None:
                change = change @ bases[layer].to(change)
            terms.append(change.square().sum(dim=-1).mean() / base[here].square().sum(-1).mean())
        return strength * torch.stack(terms).mean()

    return penalty


# The generic anchor


def _with_anchor(bench: Workbench, strength: float, subspace: Subspace | None) -> Any:
    moments = generic_moments(bench)
    model = projected(bench.fresh(), subspace)
    return bench.fit(model, penalty=anchor(model, moments, strength))


def anchor(model: nn.Module, moments: dict[str, tuple[Tensor, Tensor]], strength: float) -> Penalty:
    """`λ Σ s² tr(G ΔW C ΔWᵀ)`, from the factors: `Bᵀ G B` against `A C Aᵀ`, both `[R, R]`."""
    layers = [
        (layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"], *moments[name])
        for name, layer in adapted_layers(model)
        if name in moments
    ]

    def penalty(_model: nn.Module, _batch: Batch) -> Tensor:
        terms = [
            s**2 * ((B.weight.mT @ G @ B.weight) * (A.weight @ C @ A.weight.mT)).sum()
            for A, B, s, C, G in layers
        ]
        return strength * torch.stack(terms).sum()

    return penalty


def generic_moments(bench: Workbench) -> dict[str, tuple[Tensor, Tensor]]:
    """Linear layer -> `C[K, K] = E[x xᵀ]` and `G[N, N] = E[g gᵀ]` of the base model.

    On generic text whose labels the base model draws itself; `g` is the gradient of a token's loss
    at the output, so the two stand for the curvature of the divergence from the base model.
    """
    return bench.once("moments", lambda: _moments(bench))


def _moments(bench: Workbench) -> dict[str, tuple[Tensor, Tensor]]:
    base = bench.base()
    head = base.get_output_embeddings()
    linears = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_module: nn.Module, args: Any, output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach().flatten(0, -2), output

        return keep

    ids = documents(bench.generic_examples(), bench.device)
    embedded = base.get_input_embeddings()(ids).requires_grad_()  # so that there is a graph
    with ExitStack() as stack:
        for name, module in linears.items():
            stack.callback(module.register_forward_hook(keeper(name)).remove)
        logits = base(inputs_embeds=embedded).logits.flatten(0, 1)
    noise = torch.rand(logits.shape, generator=bench.generator("drawn labels")).to(logits)
    labels = (logits.detach() - (-noise.log()).log()).argmax(dim=-1)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    moments = {}
    for name, gradient in zip(outputs, gradients, strict=True):
        x, g = inputs[name], gradient.flatten(0, -2)
        moments[name] = (x.mT @ x / len(x), g.mT @ g / len(g))
    return moments
