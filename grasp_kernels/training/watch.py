"""Leakage and drift in the log of a training, and an end to one whose numbers are not finite.

Imports transformers, so nothing imports this module on `import grasp_kernels`.

Shapes: `N` residual width, `Q` basis size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grasp_kernels.data import neutral_prompts
from grasp_kernels.effect.stream import layer_bases, measure_movement
from grasp_kernels.inert import listed
from grasp_kernels.layers.closure import leakage
from grasp_kernels.models.architectures import SiteRules, site_rules
from grasp_kernels.models.frozen_model import measuring
from grasp_kernels.models.names import base_name
from grasp_kernels.subspace import Subspace, check_subspace

N_PROBES = 8  # no single question decides, and two forwards of each are little beside `every` steps
_KEYS = {"leakage", "drift_along", "drift_share"}


class Watch(TrainerCallback):
    """Log leakage and drift along the subspace, and stop on a loss or gradient that is not finite.

    Every `every` optimizer steps, and after the last, the log entry of that step gets

    * `leakage`: the largest ‖Vᵀ ΔW‖ / ‖ΔW‖ of a layer;
    * `drift_along`: how far the adapter moves the residual stream along the bases, the mean of
      ‖Vᵀ(h − h_base)‖ over tokens of the probes and the blocks that have a basis;
    * `drift_share`: the same relative to ‖h − h_base‖, 0 to 1.

    Without any basis losses and gradients are watched alone. Measuring changes neither what the
    model computes nor the random state. Checkpoints need no help: closed layers put closed factors
    into every state dict.

    Services that `report_to` names see the numbers of callbacks before theirs, so `GraspTrainer`
    puts this one first.

    Args:
        subspace: the bases; None: those of the GraspLoRALinear layers of the model.
        every: optimizer steps between two measurements; they are taken with the next log entry.
        probes: token ids of a few sequences to measure drift on; None: everyday questions in the
            trainer's tokenizer; empty: no drift.
        sites: writers and readers of an architecture that is not known.

    Raises:
        ValueError: when training begins, no way to measure drift; or `every` below 1.
        FloatingPointError: with the step and what to do, before the optimizer spoils the weights.
    """

    def __init__(
        self,
        subspace: Subspace | None = None,
        *,
        every: int = 50,
        probes: Sequence[Sequence[int]] | None = None,
        sites: SiteRules | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: give the steps between two measurements.")
        check_subspace(subspace)
        self.subspace = None if subspace is None or subspace.is_empty else subspace
        self.every, self.probes, self.sites = every, probes, sites

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if self.probes is None and self._bases(model):
            self.probes = _neutral_probes(kwargs.get("processing_class"))
        active = getattr(model, "active_adapters", None)
        if isinstance(active, list) and len(active) > 1 and self._bases(model):
            raise ValueError(
                f"{listed(active)} are active at once, and leakage is that of one adapter: choose "
                "one with model.set_adapter(...)."
            )
        if self.probes and not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"Drift cannot be measured on a {type(model).__name__}, whose adapter cannot be "
                "switched off: train a PeftModel, or use Watch(probes=[])."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:  # the loss scaler meets gradients that overflow, and skips the step
            return
        largest = _largest_gradient(kwargs["model"])
        if not math.isfinite(largest):
            raise FloatingPointError(
                f"The gradient became {largest} at step {state.global_step + 1} of "
                f"{state.max_steps}, which was not taken: lower the learning rate, or use float32 "
                "or bfloat16."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"The training loss became {logs['loss']} at step {state.global_step} of "
                f"{state.max_steps}: lower the learning rate, or use float32 or bfloat16."
            )
        if self._is_due(state):
            measured = self.measure(kwargs["model"])
            logs.update(measured)
            state.log_history[-1].update(measured)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure the numbers of a log entry by name; none where no layer has a basis."""
        return {**self._leakage(model), **self._drift(model)}

    def _is_due(self, state: TrainerState) -> bool:
        # Read off the history, which checkpoints keep, so that a resumed training measures where an
        # uninterrupted one does.
        last = max((e["step"] for e in state.log_history if _KEYS & e.keys()), default=0)
        return state.global_step >= last + self.every or state.global_step == state.max_steps

    def _leakage(self, model: nn.Module) -> dict[str, float]:
        if not self._bases(model):
            return {}
        return {"leakage": max(leakage(model, self.subspace).values())}

    def _drift(self, model: Any) -> dict[str, float]:
        bases = self._bases(model)
        if not (self.probes and bases):
            return {}
        rules = site_rules(model.config.model_type, bases, self.sites)
        by_layer = layer_bases(bases, rules)
        if not by_layer:  # writers before a norm alone, whose bases are not those of the stream
            return {}
        (adapter, *_) = model.active_adapters
        with measuring(model):
            moved = measure_movement(model, [adapter], by_layer, map(list, self.probes), rules)[
                adapter
            ]
        return {"drift_along": moved.mean_along, "drift_share": moved.share}

    def _bases(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the basis `V[N, Q]` by the name of its module in the base model."""
        if self.subspace is not None:
            return self.subspace.bases
        return {
            base_name(name): basis
            for name, module in model.named_modules()
            if (basis := getattr(module, "write_basis", None)) is not None
        }


def _neutral_probes(processing_class: Any) -> list[list[int]]:
    """Tokenize everyday questions with a trainer's tokenizer, or that of its processor."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is None:
        raise ValueError(
            "The trainer has no tokenizer to ask questions with, which drift is measured on: use "
            "GraspTrainer(processing_class=tokenizer), or Watch(probes=...) with token ids."
        )
    return neutral_prompts(None, tokenizer)[:N_PROBES]


def _largest_gradient(model: nn.Module) -> float:
    """Return the largest element of all gradients, nan if one is; waits for the device once."""
    gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).item()


def _local(gradient: Tensor) -> Tensor:
    """Return the part of a sharded gradient that this process holds."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
