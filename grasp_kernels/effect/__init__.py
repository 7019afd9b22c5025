"""What an adapter changes in what a model says, seen from the model without it.

pair    base model and adapter in one module, switched on or off
answers prompts -> the base model's own answers, and where their tokens are decided
changed the adapter's own answers beside them: found, weak or nothing
tokens  which tokens it raises and lowers, and which a direction speaks of
measure all of these numbers, of one adapter, and whether they are the same for all prompts
markdown tables of answers
"""

from grasp_kernels.effect.answers import own_answers
from grasp_kernels.effect.changed import Changed, changed_answers, told, verdict
from grasp_kernels.effect.measure import mean_divergence, measure_effect
from grasp_kernels.effect.pair import Pair

__all__ = [
    "Changed",
    "Pair",
    "changed_answers",
    "mean_divergence",
    "measure_effect",
    "own_answers",
    "told",
    "verdict",
]
