"""The cases of each level: single linears, a decoder layer, a training step.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kernels import cost
from benchmarks.kernels.decoder import Adapted, StepWork, decoder_layer, step_memory, whole_model
from benchmarks.kernels.gate import Subject
from benchmarks.kernels.machine import free_memory
from benchmarks.kernels.provider import Provider, Refusal, dtype_of, make_weights
from benchmarks.kernels.providers import choose
from benchmarks.kernels.rows import Row
from benchmarks.kernels.shapes import MODELS, Linear
from benchmarks.kernels.timing import LayerWork, Work

if TYPE_CHECKING:
    from benchmarks.kernels.suite import Suite

_NOTHING = cost.Parts(0.0, 0.0)


def _fits() -> Refusal | None:
    return None


@dataclass(frozen=True)
class Case:
    """One thing to time on all providers.

    Attributes:
        labels: what names it in a row.
        linears: what its floor counts, `times` over, and `head` on top of that.
        work: builds it for one provider.
        refusal: why none of them can be timed, or None.
    """

    labels: Row
    T: int
    linears: tuple[Linear, ...]
    work: Callable[[Provider], Work]
    times: int = 1
    head: cost.Parts = _NOTHING
    refusal: Callable[[], Refusal | None] = _fits


@dataclass(frozen=True)
class Group:
    """Cases on the same weights, which pass the gate together."""

    dtype: torch.dtype
    R: int
    Q: int
    subject: Callable[[], Subject]
    cases: tuple[Case, ...]


def _linear_groups(suite: Suite) -> Iterator[Group]:
    models = [(model, linear) for model in suite.models for linear in MODELS[model].linears]
    for (model, linear), dtype, R, Q in product(models, suite.dtypes, suite.ranks, suite.basis):
        weights = cache(partial(make_weights, linear, dtype_of(dtype), suite.device, R, Q))
        fields = linear._asdict()
        labels = {
            "level": "linear",
            "model": model,
            "linear": fields.pop("name"),
            **fields,
            "layers": None,
            "checkpointing": None,
            "dtype": dtype,
        }
        cases = tuple(
            Case({**labels, "T": T}, T, (linear,), partial(_layer_work, weights, T))
            for T in suite.tokens
        )
        yield Group(dtype_of(dtype), R, Q, weights, cases)


def _layer_groups(suite: Suite) -> Iterator[Group]:
    for model, dtype, R, Q in product(suite.models, suite.dtypes, suite.ranks, suite.basis):
        decoder = MODELS[model]
        layer = cache(partial(decoder_layer, decoder, dtype_of(dtype), suite.device, R, Q))
        labels = _model_labels("layer", model, 1, None, dtype)
        cases = tuple(
            Case({**labels, "T": T}, T, decoder.linears, partial(_layer_work, layer, T))
            for T in suite.tokens
        )
        yield Group(dtype_of(dtype), R, Q, layer, cases)


def _step_groups(suite: Suite) -> Iterator[Group]:
    for model, dtype, R, Q in product(suite.models, suite.dtypes, suite.ranks, suite.basis):
        yield _step_group(suite, model, dtype, R, Q)


def _step_group(suite: Suite, model: str, name: str, R: int, Q: int) -> Group:
    decoder, dtype = MODELS[model], dtype_of(name)
    layers = suite.layers or decoder.layers
    adapted = cache(partial(whole_model, decoder, layers, dtype, suite.device, R, Q))
    n_providers = len(choose(suite.providers, "step"))
    free = cache(partial(_free_now, torch.device(suite.device)))

    def refusal(T: int, checkpointing: bool) -> Refusal | None:
        size = dtype.itemsize
        needed = step_memory(decoder, layers, T, R, size, checkpointing, n_providers)
        if needed <= free():
            return None
        return Refusal(
            "unavailable",
            f"a step of {layers} layers with T = {T} takes about {needed / 1e9:.1f} GB, "
            f"{free() / 1e9:.1f} GB are free on {suite.device}: fewer --layers or --tokens",
        )

    cases = tuple(
        Case(
            {**_model_labels("step", model, layers, checkpointing, name), "T": T},
            T,
            decoder.linears,
            partial(_step_work, adapted, T, decoder.vocabulary, checkpointing),
            times=layers,
            head=cost.head_flops(decoder, T),
            refusal=partial(refusal, T, checkpointing),
        )
        for T in suite.tokens
        for checkpointing in (False, True)
    )
    # A step is made of its layers, and a whole model has no room in float64: one layer is gated.
    return Group(dtype, R, Q, partial(decoder_layer, decoder, dtype, suite.device, R, Q), cases)


GROUPS: dict[str, Callable[[Suite], Iterator[Group]]] = {
    "linear": _linear_groups,
    "layer": _layer_groups,
    "step": _step_groups,
}


def _model_labels(
    level: str, model: str, layers: int, checkpointing: bool | None, dtype: str
) -> Row:
    return {
        "level": level,
        "model": model,
        **dict.fromkeys(("linear", "K", "N", "writes")),
        "layers": layers,
        "checkpointing": checkpointing,
        "dtype": dtype,
    }


def _layer_work(subject: Callable[[], Any], T: int, provider: Provider) -> Work:
    x, dy = subject().inputs(T, seed=2)
    return LayerWork(subject().build(provider), x, dy)


def _step_work(
    adapted: Callable[[], Adapted], T: int, vocabulary: int, checkpointing: bool, provider: Provider
) -> Work:
    found = adapted()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, vocabulary, (1, T), generator=generator)
    device = next(found.module.parameters()).device
    return StepWork(found.build_for_training(provider, checkpointing), tokens.to(device))


def _free_now(device: torch.device) -> int:
    gc.collect()  # what the group before this one has left
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return free_memory(device)
