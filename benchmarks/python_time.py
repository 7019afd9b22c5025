"""What Python costs a call of a layer: so small a layer that nothing else takes time.

    python benchmarks/python_time.py

Microseconds of the forward, of the backward and of both, the least of forty rounds that go through
all layers in turn, on one thread. On a GPU nothing of this waits for results.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

from grasp_kernels.layers.linear import GraspLoRALinear

FEATURES, TOKENS, RANK = 64, 4, 8
ROUNDS, CALLS = 40, 100


def layer(ours: bool, Q: int = 0, *, frozen: bool = False, mixed: bool = False) -> lora.Linear:
    """peft's, or ours with a basis of Q directions; with A frozen; or as peft makes them by
    default, an adapter of float32 over a base of bfloat16."""
    base = nn.Sequential(nn.Linear(FEATURES, FEATURES, bias=False))
    config = LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False)
    found = get_peft_model(base, config).base_model.model[0]
    assert isinstance(found, lora.Linear)
    if ours:
        V = torch.linalg.qr(torch.randn(FEATURES, Q))[0] if Q else None
        GraspLoRALinear.adopt(found, V, "residual", True, "auto")
    found.lora_A["default"].weight.requires_grad_(not frozen)
    if mixed:
        found.base_layer.to(torch.bfloat16)
    return found


LAYERS = {
    "stock peft": lambda: layer(False),
    "ours": lambda: layer(True),
    "ours, Q = 1": lambda: layer(True, 1),
    "stock peft, A frozen": lambda: layer(False, frozen=True),
    "ours, A frozen": lambda: layer(True, frozen=True),
    "ours, A frozen, Q = 1": lambda: layer(True, 1, frozen=True),
    "stock peft, float32 over bfloat16": lambda: layer(False, mixed=True),
    "ours, float32 over bfloat16": lambda: layer(True, mixed=True),
    "ours, float32 over bfloat16, Q = 1": lambda: layer(True, 1, mixed=True),
}


def once(module: lora.Linear, n: int = CALLS) -> tuple[float, float]:
    """Seconds of a forward and of a backward, means over n calls."""
    dtype = module.base_layer.weight.dtype
    x = torch.randn(1, TOKENS, FEATURES, dtype=dtype, requires_grad=True)
    dy = torch.randn(1, TOKENS, FEATURES, dtype=dtype)
    forward = backward = 0.0
    for _ in range(n):
        start = time.perf_counter()
        y: Tensor = module(x)
        middle = time.perf_counter()
        y.backward(dy)
        forward, backward = forward + middle - start, backward + time.perf_counter() - middle
        x.grad = None
        module.zero_grad()
    return forward / n, backward / n


def rows(rounds: int = ROUNDS, calls: int = CALLS) -> Iterator[tuple[str, float, float, float]]:
    """Name, and microseconds of the forward, of the backward and of both."""
    modules = {name: make() for name, make in LAYERS.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in modules}
    for _ in range(rounds):
        for name, module in modules.items():
            found[name].append(once(module, calls))
    for name, times in found.items():
        forward, backward = (1e6 * min(column) for column in zip(*times, strict=True))
        yield name, forward, backward, 1e6 * min(sum(pair) for pair in times)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'':36}forward  backward  both")
    for name, forward, backward, both in rows():
        print(f"{name:36}{forward:7.0f}{backward:10.0f}{both:6.0f}")


if __name__ == "__main__":
    main()
