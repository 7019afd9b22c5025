"""What an adapter changes in what a model says, seen from the model without it.

pair    base model and adapter in one module, switched on or off
answers prompts -> the base model's own answers, and where their tokens are decided
shift   is the change the same for all prompts?
tokens  which tokens it raises and lowers
measure all of these numbers, of one adapter
"""

from grasp_kernels.effect.measure import mean_divergence, measure_effect

__all__ = ["mean_divergence", "measure_effect"]
