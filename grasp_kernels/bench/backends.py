"""The backends on the linear layers of a known model: checked, timed in turn, one table.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from grasp_kernels.bench.gate import Gate
from grasp_kernels.bench.ours import our_providers
from grasp_kernels.bench.peft_providers import PEFT_PROVIDERS
from grasp_kernels.bench.provider import Provider, Refusal, dtype_of, make_weights
from grasp_kernels.bench.shapes import MODELS, Linear
from grasp_kernels.bench.timing import LayerWork, Measured, time_in_turn
from grasp_kernels.cpu import warn_if_slow
from grasp_kernels.ops.lora_linear.registry import BACKENDS, LEAST_TOKENS

_TIMED = BACKENDS[:-1]  # not the specification, which nobody should time
_USUAL = {"cuda": ("llama-3.1-8b", 8192), "cpu": ("qwen2.5-0.5b", 512)}  # model and tokens


class Timed(NamedTuple):
    """One linear: milliseconds of forward and backward, or why there are none, of "peft", every
    backend and "auto"."""

    linear: Linear
    found: dict[str, float | Refusal]


def compare(
    model: str | None = None,
    *,
    dtype: str = "bfloat16",
    tokens: int | None = None,
    rank: int = 16,
    basis: int = 4,
    rounds: int = 15,
    device: str | None = None,
) -> Iterator[Timed]:
    """Time stock peft and each backend on the seven linears of a decoder layer, one after another.

    Args:
        model: a name in `MODELS`, whose shapes the linears have; None: llama-3.1-8b on a GPU,
            qwen2.5-0.5b on a CPU.
        dtype: of weights and activations, "float32", "float16" or "bfloat16".
        tokens: of a call; None: 8192 on a GPU, 512 on a CPU.
        rank, basis: of the adapter and of the basis of the writers; 0: nothing is projected.
        rounds: measurements of each.
        device: "cpu", "cuda" or one of several GPUs; None: "cuda" where there is one.

    Raises:
        ValueError: an unknown name, a number out of range, or no such device.
    """
    where = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    usual = _USUAL[where.type]
    model, tokens = model or usual[0], usual[1] if tokens is None else tokens
    if model not in MODELS:
        raise ValueError(f"model is {model!r}, which is unknown; use one of {sorted(MODELS)}.")
    least = {"tokens": (tokens, 1), "rank": (rank, 1), "basis": (basis, 0), "rounds": (rounds, 2)}
    for name, (value, at_least) in least.items():
        if value < at_least:
            raise ValueError(f"{name} is {value}; give at least {at_least}.")
    kind = dtype_of(dtype)
    if where.type == "cpu":
        warn_if_slow(kind, "stock peft is slow there, and ratios to it say little")
    providers = _providers(projects=basis > 0)
    for linear in MODELS[model].linears:
        weights = make_weights(linear, kind, str(where), rank, basis)
        gate = Gate(weights, kind)
        refused = {name: gate.refusal(provider, where) for name, provider in providers.items()}
        works = {
            name: LayerWork(provider.build(weights), *weights.inputs(tokens, seed=2))
            for name, provider in providers.items()
            if refused[name] is None
        }
        times = time_in_turn(works, where, rounds=rounds)
        yield Timed(
            linear,
            {
                name: _time(provider, refused[name] or times[name])
                for name, provider in providers.items()
            },
        )


def device_of(name: str) -> torch.device:
    """The device of a name, if it can be timed here."""
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device is {name!r}, which cannot be timed here; use 'cpu', or 'cuda' where torch "
            "sees a GPU."
        )
    return torch.device(name)


def _providers(projects: bool) -> dict[str, Provider]:
    ours, suffix = our_providers(), "-projected" if projects else ""
    backends = {name: ours[f"grasp-{name}{suffix}"] for name in _TIMED}
    return {"peft": PEFT_PROVIDERS["peft"], **backends, "auto": ours[f"grasp{suffix}"]}


def _time(provider: Provider, found: Refusal | Measured | Exception) -> float | Refusal:
    if isinstance(found, Exception):
        return provider.failure(found)
    return found if isinstance(found, Refusal) else found.both.median


def table(timed: list[Timed]) -> str:
    """A Markdown table with the sum over all linears, and which backend is the fastest.

    A sum is given where every linear was timed.
    """
    names = list(timed[0].found)
    sums = {
        name: sum(times)
        for name in names
        if len(times := [t for line in timed if isinstance(t := line.found[name], float)])
        == len(timed)
    }
    lines = [
        f"| linear | K→N | {' | '.join(names)} |",
        "|---|---|" + "---:|" * len(names),
        *(
            f"| {line.linear.name} | {line.linear.K}→{line.linear.N} | "
            + " | ".join(_cell(line.found[name]) for name in names)
            + " |"
            for line in timed
        ),
        "| **all** | | " + " | ".join(_sum(sums, name) for name in names) + " |",
        "",
        "Milliseconds, forward + backward, median (ratio to stock peft, which projects nothing). "
        "On a GPU launches are queued ahead, as in a training step; with fewer than about "
        f"{LEAST_TOKENS} tokens a call it would wait for Python, which these times leave out.",
    ]
    reasons = dict.fromkeys(
        f"- {name} {found.kind}: {found.reason}"
        for line in timed
        for name, found in line.found.items()
        if isinstance(found, Refusal)
    )
    lines += ["", *reasons] if reasons else []
    ours = {name: sums[name] for name in _TIMED if name in sums}
    if ours:
        best = min(ours, key=ours.__getitem__)
        lines += ["", f'Fastest here: backend="{best}".']
    return "\n".join(lines)


def _cell(found: float | Refusal) -> str:
    return found.kind if isinstance(found, Refusal) else f"{found:.2f}"


def _sum(sums: dict[str, float], name: str) -> str:
    if name not in sums:
        return "–"
    ratio = f" ({sums[name] / sums['peft']:.2f})" if "peft" in sums else ""
    return f"{sums[name]:.2f}{ratio}"
