"""The main job: checkpoint and chat file -> naive adapter -> subspace -> GRASP adapter -> report.

    config    every option, with its default; needs the standard library alone
    inputs    everything that can be wrong is found before the first training step
    stages    the stages in their order
    folder    the output folder: what is finished, who is at work
    training  one adapter, with transformers.Trainer
    callback  what is watched meanwhile; for anyone's Trainer too
    report    numbers, and words (report_text)

Public names are imported on first use, so that the command line starts at once.
"""

from importlib import import_module
from typing import Any

_HOMES = {"Report": "report", "RunConfig": "config", "is_finished": "stages", "run": "stages"}

__all__ = ["Report", "RunConfig", "is_finished", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp_kernels.pipeline' has no attribute {name!r}")
    return getattr(import_module(f"grasp_kernels.pipeline.{_HOMES[name]}"), name)
