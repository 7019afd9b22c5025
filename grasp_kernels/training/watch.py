"""Leakage in the log of a training, and an end to one whose numbers are not finite.

Imports transformers, so nothing imports this module on `import grasp_kernels`.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from grasp_kernels.inert import listed
from grasp_kernels.layers.closure import leakage
from grasp_kernels.models.architectures import SiteRules
from grasp_kernels.models.sharding import local_part
from grasp_kernels.subspace import Subspace, check_subspace

_KEY = "leakage"


class Watch(TrainerCallback):
    """Log the leakage into the subspace, and stop on a loss or gradient that is not finite.

    Every `every` optimizer steps, and after the last, the log entry of that step gets `leakage`:
    the largest ‖Vᵀ ΔW‖ / ‖ΔW‖ of a layer. Without any basis losses and gradients are watched alone.
    Measuring changes neither what the model computes nor the random state. Checkpoints need no
    help: closed layers put closed factors into every state dict.

    Services that `report_to` names see the numbers of callbacks before theirs, so `GraspTrainer`
    puts this one first.

    Args:
        subspace: the bases; None: those of the GraspLoRALinear layers of the model.
        every: optimizer steps between two measurements; they are taken with the next log entry.
        sites: writers of an architecture that is not known.

    Raises:
        ValueError: `every` below 1, or when training begins, two active adapters.
        FloatingPointError: with the step and what to do, before the optimizer spoils the weights.
    """

    def __init__(
        self, subspace: Subspace | None = None, *, every: int = 50, sites: SiteRules | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: give the steps between two measurements.")
        check_subspace(subspace)
        self.subspace = subspace
        self.every, self.sites = every, sites

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        active = getattr(model, "active_adapters", None)
        if isinstance(active, list) and len(active) > 1 and self._measures_leakage(model):
            raise ValueError(
                f"The adapters {listed(active)} are active at once, but leakage is measured for "
                "one: choose one with model.set_adapter(...)."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        if args.fp16:  # the loss scaler meets gradients that overflow, and skips the step
            return
        largest = _largest_gradient(kwargs["model"])
        if not math.isfinite(largest):
            raise FloatingPointError(
                f"The gradient became {largest} at step {state.global_step + 1} of "
                f"{state.max_steps}, so the step was not taken: lower the learning rate, or use "
                "float32 or bfloat16."
            )

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:  # an evaluation, or the summary at the end
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
        if not self._measures_leakage(model):
            return {}
        return {_KEY: max(leakage(model, self.subspace, sites=self.sites).values())}

    def _is_due(self, state: TrainerState) -> bool:
        # Read off the history, which checkpoints keep, so that a resumed training measures where an
        # uninterrupted one does.
        last = max((e["step"] for e in state.log_history if _KEY in e), default=0)
        return state.global_step >= last + self.every or state.global_step == state.max_steps

    def _measures_leakage(self, model: nn.Module) -> bool:
        closed = any(getattr(m, "write_basis", None) is not None for m in model.modules())
        return self.subspace is not None or closed


def _largest_gradient(model: nn.Module) -> float:
    """Return the largest element of all gradients, nan if one is; waits for the device once."""
    gradients = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).item()
