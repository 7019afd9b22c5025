"""Base model and adapter -> the answers of both to prompts that are unrelated to the task.

pair        base model and adapter in one module, with the adapter on or off
answers     prompts -> answers of both models; the verdict: found, weak or nothing
effect      change of the base model's own answers; the tokens that change most
diagnose    all of these measurements for one adapter, and their text
"""

from grasp_kernels.diagnosis.answers import Changed, changed_answers, own_answers, told, verdict
from grasp_kernels.diagnosis.diagnose import (
    Diagnosis,
    adapter_numbers,
    base_answers,
    diagnose,
    spread,
)
from grasp_kernels.diagnosis.pair import Pair

__all__ = [
    "Changed",
    "Diagnosis",
    "Pair",
    "adapter_numbers",
    "base_answers",
    "changed_answers",
    "diagnose",
    "own_answers",
    "spread",
    "told",
    "verdict",
]
