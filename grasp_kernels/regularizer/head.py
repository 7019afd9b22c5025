"""The head of a causal language model as a matrix, where it is no more than that.

Shapes: `B` sequences, `T` tokens, `n` chosen positions, `D` residual width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp_kernels.models.sharding import by_fsdp2
from grasp_kernels.ops.autocast import autocast_dtype

# Whether the logits of a model were those of its head: scales behind the head have many names.
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class LinearHead:
    """Hold the head of a model in training, and the inputs that it got.

    Attributes:
        bias: `[V]` or None.
        softcap: of the final logits, or None.
        hidden: inputs `[n, D]` at the positions of the last `reading`, in the dtype of its product.
    """

    def __init__(self, module: nn.Linear, softcap: float | None) -> None:
        self.module, self.softcap, self.bias = module, softcap, module.bias
        self.hidden = module.weight[:0]

    @property
    def weight(self) -> Tensor:
        """Return `W[V, D]` in the dtype of the inputs, as autocast has it."""
        return self.module.weight.to(self.hidden.dtype)

    @classmethod
    def of(cls, model: Any) -> LinearHead | None:
        """Return the head; None where logits may be more than a product with a weight here.

        Args:
            model: causal language model of transformers, a PeftModel of it, or one in DDP.
        """
        inside = model.module if hasattr(model, "module") else model
        module = inside.get_output_embeddings()
        is_compiled = hasattr(model, "_orig_mod") or inside._compiled_call_impl is not None
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or is_compiled:
            return None
        is_called = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if is_called or by_fsdp2(model) or not _known.get(module, True):
            return None
        config = inside.config.get_text_config()
        return cls(module, getattr(config, "final_logit_softcapping", None))

    @contextmanager
    def reading(self, mask: Tensor) -> Iterator[None]:
        """Keep the inputs at the positions of `mask[B, T]`; logits are those of the first alone."""

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            hidden = inputs[0][mask.to(inputs[0].device)]
            self.hidden = hidden.to(autocast_dtype(hidden.device) or hidden.dtype)
            return hidden[:1]

        hook = self.module.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def gives(self, logits: Tensor) -> bool:
        """Say whether the head alone makes the logits `[1, V]` of the first position.

        The first answer holds for all later calls, since it makes the host wait for a GPU.
        """
        if self.module not in _known and len(self.hidden):
            bias = None if self.bias is None else self.bias.to(self.hidden.dtype)
            z = F.linear(self.hidden[:1], self.weight, bias)
            z = z if self.softcap is None else (z / self.softcap).tanh() * self.softcap
            allowed = 4 * torch.finfo(z.dtype).eps * float(z.abs().max())
            is_here = self.hidden.device == self.weight.device
            _known[self.module] = is_here and float((z - logits).abs().max()) <= allowed
        return _known.get(self.module, False)
