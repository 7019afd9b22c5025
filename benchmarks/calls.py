"""The time of short calls, where nothing but the way to the library counts.

    python -m benchmarks.calls [--parts layer chain …] [--rounds 40] [--rows FILE]

Forward and backward of stock peft, of our layers with calls in C++ and in Python, and of the frozen
linears alone, in turn on one thread: processor time of the thread, median and quartiles of the
rounds. Without `--rows` the rows in `results/calls.jsonl` are written again.

Shapes: T tokens, K in, N out, Q basis size.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kernels.machine import environment
from benchmarks.kernels.rows import Row, write_rows
from benchmarks.kernels.shapes import MODELS
from grasp_kernels.layers import plan
from grasp_kernels.layers.linear import GraspLoRALinear
from grasp_kernels.pages.markdown import table

ROWS = Path(__file__).parent / "results" / "calls.jsonl"
FEATURES, TOKENS, RANK, CHAIN = 64, 4, 8, 17
SECONDS = 0.02  # of the calls of a round, so that the clock is finer than the time
MOST_SECONDS, LEAST_ROUNDS = 60.0, 7  # of a case


class Way(NamedTuple):
    """One way to compute the same adapted layers."""

    adapted: bool = True
    ours: bool = False
    python: bool = False
    Q: int = 0


FROZEN, PEFT = Way(adapted=False), Way()
WAYS = {
    "frozen": FROZEN,
    "peft": PEFT,
    "C++": Way(ours=True),
    "C++, Q": Way(ours=True, Q=1),
    "Python": Way(ours=True, python=True),
    "Python, Q": Way(ours=True, python=True, Q=1),
}
Call = Callable[[], None]


@contextmanager
def planned_in_python(wanted: bool) -> Iterator[None]:
    """Plans that are made in the context are those of an installation without a compiler."""
    found, plan.compiled = plan.compiled, (lambda: "not wanted") if wanted else plan.compiled
    try:
        yield
    finally:
        plan.compiled = found


def adapted(base: nn.Module, targets: list[str], writers: Iterable[str], way: Way) -> nn.Module:
    """The base with adapters, on the layers of a way; `writers` get a basis."""
    if not way.adapted:
        return base.requires_grad_(False)
    config = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(base, config).get_base_model()  # less the calls of peft's wrappers
    writers = tuple(writers)
    for name, module in model.named_modules():
        if way.ours and hasattr(module, "base_layer"):
            V = torch.linalg.qr(torch.randn(module.out_features, way.Q or 1))[0]
            writes = way.Q > 0 and name.endswith(writers)
            GraspLoRALinear.adopt(module, V if writes else None, "residual", True, "auto")
    return model


def a_call(model: nn.Module, x: Tensor, loss: bool = False) -> Call:
    """Forward and backward; gradients are dropped, as setting them to zero is not of the call."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if loss:

        def run() -> None:
            torch.autograd.backward(model(input_ids=x, labels=x).loss)
    else:
        x.requires_grad_()
        trained.append(x)
        dy = torch.ones_like(model(x))

        def run() -> None:
            torch.autograd.backward(model(x), dy)

    def call() -> None:
        run()
        for parameter in trained:
            parameter.grad = None

    return call


# --- the parts: name of a case -> a call of each way


def layer(
    count: int = 1, dtype: torch.dtype | None = None, frozen_A: bool = False
) -> dict[str, Call]:
    calls = {}
    for name, way in WAYS.items():
        base = nn.Sequential(*(nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(count)))
        names = [str(i) for i in range(count)]
        model = adapted(base, names, names, way)
        for path, parameter in model.named_parameters():
            if "lora_A" in path and frozen_A:
                parameter.requires_grad_(False)
            if "lora_" not in path and dtype is not None:
                parameter.data = parameter.data.to(dtype)
        with planned_in_python(way.python):
            calls[name] = a_call(model, torch.randn(1, TOKENS, FEATURES, dtype=dtype))
    return calls


def llama(hidden: int, intermediate: int, layers: int, T: int) -> dict[str, Call]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        vocab_size=256, **heads,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    calls = {}
    for name, way in WAYS.items():
        model = adapted(LlamaForCausalLM(config), targets, ("o_proj", "down_proj"), way)
        if way is FROZEN:
            model.enable_input_require_grads()
        with planned_in_python(way.python):
            calls[name] = a_call(model, torch.arange(T)[None] % 256, loss=True)
            calls[name]()
    return calls


def compiled(**options: Any) -> dict[str, Call]:
    names = ["0", "1", "2", "3"]
    calls = {}
    for name, way in WAYS.items():
        if way.python:
            continue  # the same as in C++
        base = nn.Sequential(*(nn.Linear(FEATURES, FEATURES, bias=False) for _ in names))
        model = torch.compile(adapted(base, names, names, way), fullgraph=True, **options)
        calls[name] = a_call(model, torch.randn(1, TOKENS, FEATURES))
    return calls


def linears(T: int) -> dict[str, Call]:
    """One after the other: the seven of a layer of Qwen2.5-0.5B, in float32."""
    shapes = MODELS["qwen2.5-0.5b"].linears
    calls = {}
    for name, way in WAYS.items():
        runs = []
        for shape in shapes:
            base = nn.Sequential(nn.Linear(shape.K, shape.N, bias=False))
            model = adapted(base, ["0"], ["0"] if shape.writes else [], way)
            with planned_in_python(way.python):
                runs.append(a_call(model, torch.randn(1, T, shape.K)))
        calls[name] = lambda runs=tuple(runs): [run() for run in runs]
    return calls


PARTS: dict[str, Callable[[], dict[str, Call]]] = {
    "layer": layer,
    "layer, A frozen": lambda: layer(frozen_A=True),
    "layer, float32 over bfloat16": lambda: layer(dtype=torch.bfloat16),
    "chain": lambda: layer(CHAIN),
    "compiled": compiled,
    "Llama D 128, 4 layers, T 16": lambda: llama(128, 384, 4, 16),
    "Llama D 128, 4 layers, T 128": lambda: llama(128, 384, 4, 128),
    "Qwen2.5-0.5B linears, T 32": lambda: linears(32),
    "Qwen2.5-0.5B linears, T 512": lambda: linears(512),
    "Qwen2.5-0.5B linears, T 2048": lambda: linears(2048),
}


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every way, in turn; rounds that are interrupted are outliers of the tail."""
    counts, seconds = {}, 0.0
    for name, call in calls.items():
        call()
        start = time.thread_time()
        call()
        once = max(time.thread_time() - start, 1e-6)
        counts[name] = max(1, int(SECONDS / once))
        seconds += counts[name] * once
    rounds = min(rounds, max(LEAST_ROUNDS, int(MOST_SECONDS / seconds)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(counts[name]):
                call()
            found[name].append(1e6 * (time.thread_time() - start) / counts[name])
    return found


def rows(parts: Iterable[str], rounds: int) -> Iterator[Row]:
    """One row for each case and way."""
    machine = environment(torch.device("cpu"))
    for part in parts:
        torch.manual_seed(0)
        found = measure(PARTS[part](), rounds)
        peft = statistics.median(found["peft"])
        for way, times in found.items():
            low, middle, high = statistics.quantiles(times, n=4)
            yield {
                "case": part, "way": way, "rounds": len(times), "median": round(middle, 1),
                "p25": round(low, 1), "p75": round(high, 1),
                "to_peft": round(middle / peft, 3), **machine,
            }  # fmt: skip


def report(found: Iterable[Row]) -> str:
    """A table of the ratios to stock peft, which is given in microseconds."""
    cases: dict[str, dict[str, Row]] = {}
    for row in found:
        cases.setdefault(row["case"], {})[row["way"]] = row
    lines = []
    for case, ways in cases.items():
        cells = [f"{ways[way]['to_peft']:.2f}" if way in ways else "" for way in WAYS]
        cells[list(WAYS).index("peft")] = f"{ways['peft']['median']:.0f} µs"
        lines.append([case, *cells])
    return table(["", *WAYS], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = list(rows(options.parts, options.rounds))
    write_rows(options.rows, found)
    print(report(found))


if __name__ == "__main__":
    main()
