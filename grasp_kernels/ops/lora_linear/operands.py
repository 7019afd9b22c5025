"""The arguments and results of every backend.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Needs(NamedTuple):
    """Hold a flag for each needed gradient."""

    x: bool
    weight: bool
    bias: bool
    lora_A: bool
    lora_B: bool
    lora_bias: bool
    base: bool = False  # only where dY is projected; elsewhere the gradient is dY itself


class Operands(NamedTuple):
    """Hold one adapted linear layer; `W`, `bias` and the activations share the compute dtype.

    The adapter may have another dtype (float32 over a bfloat16 base); the basis is float32.
    """

    weight: Tensor | None  # W [N, K]; None if another library computes the base product
    bias: Tensor | None  # [N]
    lora_A: Tensor  # A [R, K]
    lora_B: Tensor  # B [N, R]
    lora_bias: Tensor | None  # b [N]
    write_basis: Tensor | None  # V [N, Q], orthonormal columns
    dropout_seed: Tensor | None  # int64 [1]
    scaling: float
    dropout_p: float
    residual: bool  # project="residual": dY itself is projected; else only dA and dB
    closed: bool
    exact: bool = False  # multiply in the adapter's wider dtype (aten, reference)

    def adapter_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of `S`, `A` and `B°` in a computation."""
        return torch.promote_types(x.dtype, self.lora_A.dtype) if self.exact else x.dtype

    def projects(self, needs: Needs) -> bool:
        """Say whether a needed gradient contains `D = dY V`: dbase, or dX with a weight."""
        through = needs.base or (needs.x and self.weight is not None)
        return through and self.residual and self.write_basis is not None


class Saved(NamedTuple):
    """Hold the tensors for the backward, in `Operands.adapter_dtype`."""

    S: Tensor  # (X̃ Aᵀ)ᵀ = A X̃ᵀ [R, T], transposed as aten.py explains
    A: Tensor  # A [R, K]
    B: Tensor  # B° [N, R]


class Gradients(NamedTuple):
    """Hold the gradients, each in the dtype of its operand; None where not needed."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    lora_bias: Tensor | None
    base: Tensor | None = None
