"""LoRA weights -> the subspace in which a fine-tune moved."""

from grasp_kernels.identification.weights import identify

__all__ = ["identify"]
