"""The head of a causal language model as a matrix, where it is no more than that.

Shapes: `B` sequences, `T` tokens, `n` chosen positions, `D` residual width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp_kernels.models.frozen_model import measuring
from grasp_kernels.models.sharding import by_fsdp2, is_away
from grasp_kernels.ops.autocast import autocast_dtype

# Model -> its head, and whether logits are what this makes: scales behind a head have many names.
_known: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], bool]] = WeakKeyDictionary()
_LOGIT = 30.0  # the largest one of the look, so that a cap shows


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

        A model that is new here runs once in evaluation mode, with an input of its head that is
        made here. Nothing is drawn from torch's generators, so a training that is resumed goes on
        to the same bits.

        Args:
            model: causal language model of transformers, a PeftModel of it, or one in DDP.
        """
        inside = model.module if hasattr(model, "module") else model
        module = inside.get_output_embeddings()
        is_compiled = hasattr(model, "_orig_mod") or inside._compiled_call_impl is not None
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or is_compiled:
            return None
        is_called = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        ends = module.weight, inside.get_input_embeddings().weight
        if is_called or any(map(is_away, ends)) or by_fsdp2(model):
            return None
        head = cls(inside)
        before, gives = _known.get(inside, (None, False))
        if before is None or before() is not module:
            gives = head._gives_logits(inside)
            _known[inside] = ref(module), gives
        return head if gives else None

    @contextmanager
    def reading(self, mask: Tensor) -> Iterator[None]:
        """Keep the inputs at the positions of `mask[B, T]`; logits are those of the first alone.

        Raises:
            RuntimeError: the model did not call the head.
        """

        def keep(hidden: Tensor) -> Tensor:
            hidden = hidden[mask.to(hidden.device)]
            self.hidden = hidden.to(autocast_dtype(hidden.device) or hidden.dtype)
            return hidden[:1]

        with self._given(keep):
            yield

    @contextmanager
    def _given(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Give the head another input inside the context, which has to call it."""
        calls: list[bool] = []

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            calls.append(True)
            return change(inputs[0])

        handle = self.module.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        if not calls:
            raise RuntimeError(
                "The model left out the hook on its head, as a part of it does that was compiled "
                "in an earlier forward: compute the first loss before, or do not compile it."
            )

    def _gives_logits(self, model: Any) -> bool:
        """Say whether the model returns what the head makes, up to rounding."""
        weight, drawn = self.module.weight, torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, weight.shape[1], generator=drawn).to(weight)
        used: list[tuple[Tensor, torch.dtype]] = []

        def replaced(hidden: Tensor) -> Tensor:
            made = (x * (_LOGIT / F.linear(x, weight).float().abs().max())).to(hidden)
            used.append((made, autocast_dtype(hidden.device) or hidden.dtype))
            return made

        ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        with measuring(model):
            with self._given(replaced):
                logits = model(input_ids=ids, use_cache=False).logits
            made, dtype = used[0]
            if made.device != weight.device:
                return False
            bias = None if self.bias is None else self.bias.to(dtype)
            z = F.linear(made.to(dtype), weight.to(dtype), bias)
            z = z if self.softcap is None else (z / self.softcap).tanh() * self.softcap
            return float((z - logits).norm()) <= torch.finfo(dtype).eps * float(z.norm())
