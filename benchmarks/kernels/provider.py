"""What a provider is, and the weights that all providers of a case share.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.kernels.shapes import Linear
from grasp_kernels.ops.projection import project_columns

Bases = dict[str, Tensor]  # name of a LoRA layer -> its basis V[N, Q]
SCALING = 2.0


class Refusal(NamedTuple):
    """Why there is no time.

    kind: "unavailable" (it cannot run here, which says nothing about it), "wrong" (its results are
    over the budget) or "failed" (it raised where it should have run).
    """

    kind: str
    reason: str


@dataclass(frozen=True)
class Weights:
    """`W[N, K]` and the adapter in the compute dtype; `V[N, Q]` in float32."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    write_basis: Tensor | None

    def build(self, provider: Provider) -> nn.Module:
        """The layer of a provider on these weights."""
        return provider.build(self)

    def double(self) -> Weights:
        """The same in float64."""
        wide: dict[str, Any] = {
            name: value.double() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Weights(**wide)

    def inputs(self, T: int, seed: int) -> tuple[Tensor, Tensor]:
        """`x[T, K]` and `dy[T, N]`."""
        N, K = self.weight.shape
        return normal(self.weight, seed, (T, K), (T, N))


def _everywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to compute an adapted linear layer.

    Attributes:
        what: one line for people.
        build: the layer for the weights of a case.
        adapt: turns peft's layers inside a module (a decoder layer, a model) into the provider's;
            None when it exists for single linears alone.
        adapters: dtype of the adapter, "base" (that of the frozen weight) or "float32", or "none".
        projects: whether the projection is part of what it computes.
        frozen_A: whether A is frozen, so that it computes no dA, which the floor still counts.
        unavailable: why it cannot run on a device in a dtype, or None.
        backend: of ours the backend that computes, or "auto".
        by_default: timed when no provider is named.
    """

    what: str
    build: Callable[[Weights], nn.Module]
    adapt: Callable[[nn.Module, Bases], nn.Module] | None = None
    adapters: str = "base"
    projects: bool = False
    frozen_A: bool = False
    unavailable: Callable[[torch.device, torch.dtype], str | None] = _everywhere
    backend: str | None = None
    by_default: bool = False

    def failure(self, error: Exception) -> Refusal:
        """What an exception of this provider is reported as."""
        if isinstance(error, torch.OutOfMemoryError):
            return Refusal("unavailable", "the device is out of memory for it")
        text = str(error).strip()
        first = text.splitlines()[0] if text else "no message"
        return Refusal("failed", f"it raised {type(error).__name__}: {first}")


def normal(like: Tensor, seed: int, *shapes: tuple[int, ...]) -> Any:
    """Standard normal tensors in the dtype of `like`, drawn on its device."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
        for shape in shapes
    )


def orthonormal(
    rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Random `[rows, columns]` with orthonormal columns."""
    gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].to(dtype)


def make_weights(linear: Linear, dtype: torch.dtype, device: str, R: int, Q: int) -> Weights:
    """Weights of one linear; a writer gets a basis when Q is not 0."""
    K, N = linear.K, linear.N
    like = torch.empty(0, dtype=dtype, device=device)
    weight, lora_A, lora_B = (
        tensor.mul_(tensor.shape[1] ** -0.5) for tensor in normal(like, 0, (N, K), (R, K), (N, R))
    )
    basis = None
    if linear.writes and Q:
        basis = orthonormal(N, Q, torch.Generator().manual_seed(0)).to(device)
    return Weights(weight, lora_A, closed(lora_B, basis), SCALING, basis)


def closed(lora_B: Tensor, basis: Tensor | None) -> Tensor:
    """`(I − V Vᵀ) B`: stock layers cannot close a factor, closed ones let all compute the same."""
    if basis is None:
        return lora_B
    return project_columns(lora_B.double(), basis).to(lora_B.dtype)


def trained(layer: nn.Module) -> list[Tensor]:
    """The parameters whose gradients a step computes."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def dtype_of(name: str) -> torch.dtype:
    """float32, float16 or bfloat16 by name."""
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"dtype is {name!r}, which is unknown; use one of {sorted(dtypes)}.")
    return dtypes[name]
