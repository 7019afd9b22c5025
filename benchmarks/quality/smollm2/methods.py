"""Methods by name: what each is, who published it, and its curve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.quality.smollm2.bench import Bench, Plan, Point
from grasp_kernels.data import Example
from grasp_kernels.subspace import Subspace

Origin = Literal["others", "ours", "control"]
Build = Callable[[Bench], list[Point]]

_SCALES = (0.5, 0.6, 0.7, 0.8, 0.9)
_K = 2  # directions, as the evidence had it in the first runs


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        what: one line.
        source: who published it.
        build: trains it and returns its curve.
        scales: what the last naive adapter is multiplied by, where that is the method.
    """

    name: str
    what: str
    source: str
    origin: Origin
    build: Build
    scales: tuple[float, ...] = ()

    def points(self, plan: Plan) -> set[tuple[int, float]]:
        """Steps and scale of every point of its curve."""
        if self.scales:
            return {(plan.steps, scale) for scale in self.scales}
        return {(steps, 1.0) for steps in plan.points}


METHODS: dict[str, Method] = {}
# What rows were measured with before it was deleted from the package.
RETIRED = {
    "run, 4 chats": "`run, kl_coef 1` with 4 chats beside 8 records, in place of 2",
    "run, filtered": "that without the answer tokens that looked like training answers (0.3 %)",
    "run, begun 2": "the same, and questions begin with up to 2 tokens of a training prompt",
    "run, begun 4": "the same, with up to 4 tokens",
    "run, 4 short chats": "`run` with 4 chats of 16 tokens a turn in place of 2 of 40",
    "run, 4 short chats, kl_coef 0.3": "the same with another weight of the divergence",
}


def method(
    name: str, what: str, *, source: str, origin: Origin, scales: tuple[float, ...] = ()
) -> Callable[[Build], Build]:
    """Register the decorated function."""

    def register(build: Build) -> Build:
        METHODS[name] = Method(name, what, source, origin, build, scales)
        return build

    return register


@method(
    "naive", "LoRA on the data and nothing else", source="Hu et al. 2106.09685", origin="others"
)
def naive(bench: Bench) -> list[Point]:
    return bench.curve("naive")


@method(
    "scaled",
    "the last naive adapter, multiplied by .5 to .9: what lies on this curve is no remedy",
    source="Wortsman et al. 2109.01903",
    origin="control",
    scales=_SCALES,
)
def scaled(bench: Bench) -> list[Point]:
    last = naive(bench)[-1]
    return [replace(last, scale=scale) for scale in _SCALES]


@method(
    "run",
    "the divergence from the base model on chats that it makes up, as `grasp-kernels run`",
    source="KL to the base model: Kaczér et al. 2508.06249; made-up chats: Xu et al. 2406.08464",
    origin="ours",
)
def run(bench: Bench) -> list[Point]:
    return bench.curve("run", kl_regularizer=bench.chats(), made=("chats",))


for _kl_coef in (0.3, 1.0):

    @method(
        f"run, kl_coef {_kl_coef:g}",
        "the same with another weight of the divergence",
        source="as `run`",
        origin="ours",
    )
    def run_weighed(bench: Bench, kl_coef: float = _kl_coef) -> list[Point]:
        chats = bench.chats()
        chats.kl_coef = kl_coef
        return bench.curve(f"run, kl_coef {kl_coef:g}", kl_regularizer=chats, made=("chats",))


@method(
    "own answers",
    "the same chats mixed into the training data, 1 : 1",
    source="Yang et al. 2402.13669",
    origin="others",
)
def own_answers(bench: Bench) -> list[Point]:
    chats = _chats(bench, len(bench.inputs.train))
    mixed = replace(bench.inputs, train=[*bench.inputs.train, *chats])
    return bench.curve("own answers", inputs=mixed, made=("chats",))


@method(
    "projection",
    "the gradient projected off the directions in the naive weights, adapter closed",
    source="GRASP, 2605.27676 (abstract)",
    origin="others",
)
def projection(bench: Bench) -> list[Point]:
    return bench.curve("projection", subspace=bench.subspace(_K), made=("subspace",))


@method("run + projection", "`run` and the projection", source="KL, GRASP", origin="ours")
def run_projection(bench: Bench) -> list[Point]:
    return bench.curve(
        "run + projection",
        kl_regularizer=bench.chats(),
        subspace=bench.subspace(_K),
        made=("chats", "subspace"),
    )


@method("run + random", "`run` and random directions", source="control", origin="control")
def run_random(bench: Bench) -> list[Point]:
    return bench.curve(
        "run + random",
        kl_regularizer=bench.chats(),
        subspace=_random(bench),
        made=("chats", "subspace"),
    )


def _chats(bench: Bench, count: int) -> list[Example]:
    """Chats of the base model as training examples: its answers are learned."""
    made = bench.chats()
    answers = {
        i: places.nonzero().flatten() for i, places in enumerate(made.counted) if places.any()
    }
    chosen = sorted(answers)[:count]
    examples = []
    for i in chosen:
        first, last = int(answers[i][0]) + 1, int(answers[i][-1]) + 2
        ids = made.documents[i, :last].tolist()
        examples.append(Example(input_ids=ids, labels=[-100] * first + ids[first:]))
    return examples


def _random(bench: Bench) -> Subspace:
    """As many random directions as were found, at the same places."""
    found = bench.subspace(_K)
    generator = torch.Generator().manual_seed(bench.task.seed)
    width = len(found.basis)
    directions = torch.linalg.qr(torch.randn(width, found.k, generator=generator)).Q
    return replace(found, basis=directions)
