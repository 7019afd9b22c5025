"""No time is reported for a provider whose results are wrong.

Shapes: T tokens, K in, N out.
"""

from __future__ import annotations

from statistics import median
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.kernels.errors import budget, relative_error
from benchmarks.kernels.peft_providers import PEFT_PROVIDERS
from benchmarks.kernels.provider import Provider, Refusal, trained

_TOKENS = 64  # enough to see a missing term, little enough for float64
_DRAWS = 5  # errors are medians over inputs: that of one input may be luck


_Found = dict[str, Tensor]


class Subject(Protocol):
    """The weights of a case, of a single linear or of a decoder layer."""

    def build(self, provider: Provider) -> nn.Module: ...

    def double(self) -> Subject: ...

    def inputs(self, T: int, seed: int) -> tuple[Tensor, Tensor]: ...


class Gate:
    """Compares providers on the weights of one case with float64.

    The scale of an error is that of stock peft in the same dtype, with the hook if the provider
    projects, which computes the same function.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype) -> None:
        self.subject, self.dtype = subject, dtype
        self.inputs = [subject.inputs(_TOKENS, seed) for seed in range(1, 1 + _DRAWS)]
        self._stock: dict[bool, tuple[list[_Found], dict[str, float]]] = {}

    def refusal(self, provider: Provider, device: torch.device) -> Refusal | None:
        """Why the provider is not timed, or None."""
        reason = provider.unavailable(device, self.dtype)
        if reason is not None:
            return Refusal("unavailable", reason)
        if provider.adapters == "none":  # there is nothing of an adapter in it to be wrong
            return None
        try:
            worse = self.over_budget(provider)
        except Exception as error:  # whatever it raises, the others are still timed
            return provider.failure(error)
        if not worse:
            return None
        return Refusal("wrong", ", ".join(f"{name} {error:.1e}" for name, error in worse.items()))

    def over_budget(self, provider: Provider) -> dict[str, float]:
        """The results whose error passes the budget of `errors`: name -> error."""
        if provider.projects not in self._stock:
            self._stock[provider.projects] = self._measure_stock(provider.projects)
        exact, allowed = self._stock[provider.projects]
        if provider.frozen_A:
            exact = [
                {n: v for n, v in found.items() if not n.endswith("lora_A")} for found in exact
            ]
        errors = self._errors(self.subject.build(provider), exact)
        return {name: error for name, error in errors.items() if not error <= allowed[name]}

    def _measure_stock(self, projects: bool) -> tuple[list[_Found], dict[str, float]]:
        """Exact results of each input, and the error that each result may have."""
        stock = PEFT_PROVIDERS["peft-hook" if projects else "peft"]
        wide = self.subject.double().build(stock)
        exact = [_results(wide, x.double(), dy.double()) for x, dy in self.inputs]
        theirs = self._errors(self.subject.build(stock), exact)
        longest = max(size for found in exact for value in found.values() for size in value.shape)
        return exact, {name: budget(error, self.dtype, longest) for name, error in theirs.items()}

    def _errors(self, layer: nn.Module, exact: list[_Found]) -> dict[str, float]:
        """Results by the names of `exact`, which has them in the same order."""
        errors: dict[str, list[float]] = {}
        for (x, dy), expected in zip(self.inputs, exact, strict=True):
            found = _results(layer, x, dy).values()
            for (name, value), result in zip(expected.items(), found, strict=True):
                errors.setdefault(name, []).append(relative_error(result, value))
        return {name: median(values) for name, values in errors.items()}


def _results(layer: nn.Module, x: Tensor, dy: Tensor) -> _Found:
    """`y`, `dx` and the gradients of the adapter, in the order of the layer's parameters."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    gradients = torch.autograd.grad(y, [leaf, *trained(layer)], dy)
    trained_names = [name for name, p in layer.named_parameters() if p.requires_grad]
    names = ["dx", *(f"d{_short(name)}" for name in trained_names)]
    return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


def _short(name: str) -> str:
    """ "q_proj.lora_A" of "base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"."""
    return ".".join(name.removesuffix(".default.weight").split(".")[-2:])
