"""LoRA weights -> the directions of the residual stream along which a fine-tune moved; their file.

basis              orthonormal directions, and the same directions at the output of a layer
identification     adapters -> Subspace
"""

from grasp_kernels.subspace.basis import Subspace, check_subspace, orthonormal
from grasp_kernels.subspace.identification import identify

__all__ = ["Subspace", "check_subspace", "identify", "orthonormal"]
