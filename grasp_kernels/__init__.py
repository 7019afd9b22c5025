"""Fine-tune a language model with LoRA, without the habits that come with the data.

The way of the data, one folder a step:

    data            file of chats               -> records -> token ids with labels
    models          checkpoint                  -> model, its answers, its residual stream
    adapters        peft model, folder or file  -> LoRA weights with their sites
    subspace        LoRA weights                -> Subspace, saved as safetensors
    layers          peft model and Subspace     -> the same model on GraspLoRALinear
    ops             the differentiable operator -> a backend -> gradients
    regularizer     base model and examples     -> a loss that keeps the model at the base elsewhere
    training        trainer                     -> the same with fast layers and this loss
    diagnosis       base model and adapter      -> its answers next to the base model's
    pipeline        checkpoint and chat file    -> all steps: `run`, which returns a `Report`

Importing the package needs torch alone; every public name is imported on first use.
"""

from importlib import import_module
from typing import Any

from grasp_kernels.version import __version__

_HOMES = {
    "Diagnosis": "diagnosis",
    "GraspConfig": "config",
    "GraspLoRALinear": "layers.linear",
    "GraspTrainer": "training.trainer",
    "GraspTrainerMixin": "training.trainer",
    "KLRegularizer": "regularizer",
    "Report": "pipeline.report",
    "RunConfig": "pipeline.config",
    "Subspace": "subspace",
    "apply_grasp": "training.apply",
    "diagnose": "diagnosis",
    "extract_adapter": "adapters.extraction",
    "fold_scaling": "adapters.portable",
    "fused_linear_kl": "ops.linear_kl",
    "identify": "subspace",
    "leakage": "layers.closure",
    "lora_linear": "ops",
    "project_adapter": "layers.closure",
    "remove_grasp": "training.apply",
    "run": "pipeline.stages",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp_kernels' has no attribute {name!r}")
    value = getattr(import_module(f"grasp_kernels.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
