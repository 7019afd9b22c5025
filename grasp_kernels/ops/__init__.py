"""The differentiable operators and the backends behind them; no stage is imported here.

lora_linear   the operator, its specification and its backends
linear_kl     the divergence of two models from the inputs of their heads
gated         the product of a gated MLP, computed again instead of kept
projection    gradients and matrices off a basis
kernels       the modules of kernels, where they run
gpu           what all kernels share
"""

from grasp_kernels.ops.lora_linear.api import lora_linear
from grasp_kernels.ops.lora_linear.registry import backends
from grasp_kernels.ops.projection import project_gradient

__all__ = ["backends", "lora_linear", "project_gradient"]
