"""Base model and adapter -> what the adapter says, beside the base model, to prompts of no task.

pair        base model and adapter in one module, switched on or off; folders -> that module
answers     prompts -> both models' answers; which have changed: found, weak or nothing
effect      how far the base model's own answers change, which tokens most, what a direction says
movement    how far the residual stream moves, along which direction, and which records most
exchange    how much of the effect the movement along a direction carries
diagnose    all of these, of one adapter
report      numbers -> text
"""

from grasp_kernels.diagnosis.answers import Changed, changed_answers, own_answers, told, verdict
from grasp_kernels.diagnosis.diagnose import Diagnosis, Options, diagnose
from grasp_kernels.diagnosis.pair import Pair

__all__ = [
    "Changed",
    "Diagnosis",
    "Options",
    "Pair",
    "changed_answers",
    "diagnose",
    "own_answers",
    "told",
    "verdict",
]
