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
from grasp_kernels.diagnosis.movement import measure_moved
from grasp_kernels.diagnosis.pair import Pair
from grasp_kernels.inert import listed
from grasp_kernels.layers.closure import leakage
from grasp_kernels.models.architectures import SiteRules, model_rules
from grasp_kernels.models.frozen_model import measuring
from grasp_kernels.subspace import Subspace, check_subspace

N_PROBES = 8  # no single question decides, and two forwards of each are little beside `every` steps
_KEYS = {"leakage", "drift_along", "drift_share"}


class Watch(TrainerCallback):
    """Log leakage and drift along the subspace, and stop on a loss or gradient that is not finite.

    Every `every` optimizer steps, and after the last, the log entry of that step gets

    * `leakage`: the largest ‖Vᵀ ΔW‖ / ‖ΔW‖ of a layer;
    * `drift_along`: how far the adapter moves the residual stream along the basis, ‖Vᵀ(h − h_base)‖
      of the mean over the tokens of a probe, on average over probes and blocks;
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
        sites: writers of an architecture that is not known.

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
        self.subspace = subspace
        self.every, self.probes, self.sites = every, probes, sites

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if self.probes is None and self._basis(model) is not None:
            self.probes = _neutral_probes(kwargs.get("processing_class"))
        active = getattr(model, "active_adapters", None)
        if isinstance(active, list) and len(active) > 1 and self._measures_leakage(model):
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
        if not self._measures_leakage(model):
            return {}
        return {"leakage": max(leakage(model, self.subspace, sites=self.sites).values())}

    def _measures_leakage(self, model: nn.Module) -> bool:
        closed = any(getattr(m, "write_basis", None) is not None for m in model.modules())
        return self.subspace is not None or closed

    def _drift(self, model: Any) -> dict[str, float]:
        basis = self._basis(model)
        if not self.probes or basis is None:
            return {}
        pair = Pair.of(model, model_rules(model, self.sites))
        spans = [(0, len(probe)) for probe in self.probes]
        with measuring(model):
            moved = measure_moved(pair, self.probes, spans, batch_size=len(spans)).delta
        along = (moved @ basis.to(moved)).norm(dim=-1)  # [L, M]
        total = moved.norm(dim=-1).sum()
        share = along.sum() / total if total else total
        return {"drift_along": along.mean().item(), "drift_share": share.item()}

    def _basis(self, model: nn.Module) -> Tensor | None:
        """Return the basis of the stream `[D, Q]`, given or that of a layer which writes to it."""
        if self.subspace is not None:
            return self.subspace.basis
        found = (
            module.write_basis
            for module in model.modules()
            if getattr(module, "project", None) == "residual"
        )
        return next((basis for basis in found if isinstance(basis, Tensor)), None)


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
