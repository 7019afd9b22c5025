"""Orthonormal bases by module name, saved as safetensors; knows no adapter and no layer."""

from grasp_kernels.subspace.basis import SIDES, Subspace, check_basis, orthonormal

__all__ = ["SIDES", "Subspace", "check_basis", "orthonormal"]
