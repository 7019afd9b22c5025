"""Every case with every provider, checked, then timed.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from grasp_kernels.bench.gate import over_budget
from grasp_kernels.bench.providers import PROVIDERS, Provider, Weights, dtype_of
from grasp_kernels.bench.rows import Row, environment
from grasp_kernels.bench.shapes import MODELS, Linear
from grasp_kernels.bench.timing import time_in_turn
from grasp_kernels.testing import orthonormal


@dataclass(frozen=True)
class Suite:
    """What to measure. Every linear layer of each model; writers get a write basis of size Q."""

    models: tuple[str, ...] = ("qwen2.5-0.5b",)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    tokens: tuple[int, ...] = (512,)
    rank: int = 16
    basis: int = 4
    rounds: int = 15
    providers: tuple[str, ...] = tuple(PROVIDERS)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        for kind, names, known in (
            ("model", self.models, MODELS),
            ("provider", self.providers, PROVIDERS),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(f"{kind} {unknown[0]!r} is unknown; use some of {sorted(known)}.")
        for name in self.dtypes:
            dtype_of(name)
        if min(*self.tokens, self.rank, self.basis, self.rounds - 1) < 1:
            raise ValueError(
                f"tokens {self.tokens}, rank {self.rank} and basis {self.basis} must be at least 1 "
                f"and rounds {self.rounds} at least 2."
            )


def run_suite(suite: Suite) -> Iterator[Row]:
    """One row a case and provider, in the order of the table."""
    machine = environment()
    for model in suite.models:
        for linear in dict.fromkeys(MODELS[model]):
            for dtype in suite.dtypes:
                weights = _weights(linear, dtype, suite)
                refused = {name: _refusal(PROVIDERS[name], weights) for name in suite.providers}
                for T in suite.tokens:
                    case = {"model": model, **linear._asdict(), "dtype": dtype, "T": T}
                    case["linear"] = case.pop("name")
                    yield from _measure(case, suite, weights, refused, machine)


def _measure(
    case: Row, suite: Suite, weights: Weights, refused: dict[str, str | None], machine: Row
) -> Iterator[Row]:
    (N, K), T = weights.weight.shape, case["T"]
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(T, width, generator=generator).to(weights.weight) for width in (K, N))
    layers = {
        name: PROVIDERS[name].build(weights) for name, reason in refused.items() if reason is None
    }
    times = time_in_turn(layers, x, dy, rounds=suite.rounds)
    for name, reason in refused.items():
        measured = {part: asdict(t) for part, t in times[name].items()} if name in times else {}
        missing = {"median": None}
        yield {
            **case,
            "R": suite.rank,
            "Q": suite.basis,
            "provider": name,
            "projects": PROVIDERS[name].projects,
            "refused": reason,
            "rounds": suite.rounds,
            **{part: measured.get(part, missing) for part in ("forward", "backward", "both")},
            **machine,
        }


def _refusal(provider: Provider, weights: Weights) -> str | None:
    """Why a provider is not timed: the results that are over budget."""
    if provider is PROVIDERS["frozen"]:
        return None
    stock = PROVIDERS["peft-hook" if provider.projects else "peft"]
    worse = over_budget(provider, weights, stock)
    return None if not worse else ", ".join(f"{name} {error:.1e}" for name, error in worse.items())


def _weights(linear: Linear, dtype: str, suite: Suite) -> Weights:
    generator = torch.Generator().manual_seed(0)
    K, N, R = linear.K, linear.N, suite.rank

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return values.to(suite.device, dtype_of(dtype))

    basis = orthonormal(N, suite.basis, generator).to(suite.device) if linear.writes else None
    weight, lora_A, lora_B = normal(N, K), normal(R, K), normal(N, R)
    if basis is not None:
        # The stock layer cannot close its factors; closed ones make both compute the same function.
        closed = lora_B.double() - basis.double() @ (basis.double().mT @ lora_B.double())
        lora_B = closed.to(lora_B.dtype)
    return Weights(weight, lora_A, lora_B, 2.0, basis, None)
