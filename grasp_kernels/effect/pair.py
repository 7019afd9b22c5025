"""A base model and its adapter in one module: forwards with the adapter on or off.

Only what was asked for leaves a forward: block outputs are seen (and changed) by functions of the
caller, and the unembedding works on chosen positions alone, so that no `[B, T, V]` logits are made.

Shapes: `B` sequences of a batch, `T` tokens of the longest of them, `M` chosen positions, `V`
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.models.architectures import SiteRules
from grasp_kernels.models.frozen_model import Edit, head_at, output_hook, pad

Position = tuple[int, int]  # (sequence of the batch, token)


@dataclass(frozen=True)
class Pair:
    """`model` is a PeftModel with one active adapter; `blocks` its decoder blocks by layer."""

    model: Any
    rules: SiteRules
    blocks: dict[int, nn.Module]

    @property
    def layers(self) -> list[int]:
        return list(self.blocks)

    @property
    def base(self) -> Any:
        """The module of transformers inside, which runs with the adapter unless it is off."""
        return self.model.get_base_model()

    def switched(self, adapter: bool) -> Any:
        """Context in which the adapter is on or off."""
        return nullcontext() if adapter else self.model.disable_adapter()

    def log_probs(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Position],
        *,
        adapter: bool,
        edits: Mapping[int, Edit] | None = None,
    ) -> Tensor:
        """Float32 `[M, V]`: log probabilities of the next token at the chosen positions."""
        ids, mask = pad(self.base, sequences, "right")
        rows, columns = (torch.tensor(index) for index in zip(*positions, strict=True))

        with ExitStack() as stack:
            stack.enter_context(self.switched(adapter))
            stack.enter_context(head_at(self.base, (rows, columns)))
            for layer, edit in (edits or {}).items():
                hook = output_hook(edit)
                stack.callback(self.blocks[layer].register_forward_hook(hook).remove)
            logits = self.base(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits.float().log_softmax(dim=-1)
