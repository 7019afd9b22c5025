"""Every method of the quality benchmark, one small function each.

registry     names, sources, what a method knows
plain        naive fine-tune, early stopping, other data, other prompts
projection   GRASP in its variants, and its controls: random, supervised
activations  CAFT, Reverse-CAFT, steering, ablation
penalties    anchors, divergence from the base model, features
weights      what is done to ΔW: truncations, SafeLoRA, OPLoRA, null space
reads        what is done to A: frozen, contrastive, and that with an anchor and GRASP

Importing the package registers all of them.
"""

from importlib import import_module

from grasp_kernels.quality.methods.registry import INFORMATION, METHODS, ORIGINS, Method, select

for _part in ("plain", "projection", "activations", "penalties", "weights", "reads"):
    import_module(f"{__name__}.{_part}")

__all__ = ["INFORMATION", "METHODS", "ORIGINS", "Method", "select"]
