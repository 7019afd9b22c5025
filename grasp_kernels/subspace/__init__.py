"""LoRA weights -> the directions of the residual stream in which a fine-tune moved, and their file.

basis              orthonormal directions, and what they are at the output of a layer
stack              weights of adapters -> one matrix
identification     adapters -> Subspace
"""

from grasp_kernels.subspace.basis import Subspace, check_subspace, orthonormal
from grasp_kernels.subspace.identification import identify

__all__ = ["Subspace", "check_subspace", "identify", "orthonormal"]
