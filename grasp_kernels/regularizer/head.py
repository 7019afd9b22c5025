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

from grasp_kernels.models.frozen_model import measuring
from grasp_kernels.models.sharding import by_fsdp2
from grasp_kernels.ops.autocast import autocast_dtype

# Whether the logits of a model are those of its head: scales behind the head have many names.
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class LinearHead:
    """Hold the head of a model in training, and the inputs that it got.

    Attributes:
        bias: `[V]` or None.
        softcap: of the final logits, or None.
        hidden: inputs `[n, D]` at the positions of the last `reading`, in the dtype of its product.
    """

    def __init__(self, model: Any) -> None:
        self.module = model.get_output_embeddings()
        self.bias = self.module.bias
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.hidden = self.module.weight[:0]

    @property
    def weight(self) -> Tensor:
        """Return `W[V, D]` in the dtype of the inputs, as autocast has it."""
        return self.module.weight.to(self.hidden.dtype)

    @classmethod
    def of(cls, model: Any) -> LinearHead | None:
        """Return the head; None where logits may be more than a product with a weight here.

        A model that is new here is asked for one token, in evaluation mode: nothing is drawn, so a
        training that is resumed goes on to the same bits.

        Args:
            model: causal language model of transformers, a PeftModel of it, or one in DDP.
        """
        inside = model.module if hasattr(model, "module") else model
        module = inside.get_output_embeddings()
        is_compiled = hasattr(model, "_orig_mod") or inside._compiled_call_impl is not None
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or is_compiled:
            return None
        is_called = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if is_called or by_fsdp2(model):
            return None
        head = cls(inside)
        if module not in _known:
            _known[module] = head._gives_logits(inside)
        return head if _known[module] else None

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

    def _gives_logits(self, model: Any) -> bool:
        """Say whether the model returns what the head makes, up to rounding."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        with measuring(model):
            with self.reading(torch.ones_like(ids, dtype=torch.bool)):
                logits = model(input_ids=ids, use_cache=False).logits
            if self.hidden.device != self.module.weight.device:
                return False
            bias = None if self.bias is None else self.bias.to(self.hidden.dtype)
            z = F.linear(self.hidden, self.weight, bias)
            z = z if self.softcap is None else (z / self.softcap).tanh() * self.softcap
            allowed = 4 * torch.finfo(z.dtype).eps * float(z.abs().max())
            return float((z - logits).abs().max()) <= allowed
