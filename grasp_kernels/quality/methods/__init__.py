"""Every method of the quality benchmark, one small function each.

registry     names, sources, what a method knows
plain        naive fine-tune, early stopping, other data, other prompts
projection   GRASP in its variants, and its controls: random, supervised
activations  CAFT, Reverse-CAFT, steering, ablation
penalties    anchors, divergence from the base model, features
weights      what is done to ΔW: truncations, SafeLoRA, OPLoRA, null space

Importing the package registers all of them.
"""

from grasp_kernels.quality.methods import (  # noqa: F401  (imported to be registered)
    plain,
    projection,
    activations,  # isort: skip
    penalties,
    weights,
)
from grasp_kernels.quality.methods.registry import INFORMATION, METHODS, Method, select

__all__ = ["INFORMATION", "METHODS", "Method", "select"]
