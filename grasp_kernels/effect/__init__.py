"""What an adapter changes in what a model says, seen from the model without it.

pair    base model and adapter in one module, switched on or off
answers prompts -> the base model's own answers, and where their tokens are decided
shift   is the change the same for all prompts?
tokens  which tokens it raises and lowers
measure all of these numbers, of one adapter
"""

from grasp_kernels.effect.answers import own_answers
from grasp_kernels.effect.measure import common_verdict, mean_divergence, measure_effect
from grasp_kernels.effect.pair import Pair

__all__ = ["Pair", "common_verdict", "mean_divergence", "measure_effect", "own_answers"]
