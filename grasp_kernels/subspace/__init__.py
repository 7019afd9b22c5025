"""Orthonormal bases by module name, saved as safetensors; knows no adapter and no layer."""

from grasp_kernels.subspace.basis import SCOPES, Subspace, check_basis, orthonormal

__all__ = ["SCOPES", "Subspace", "check_basis", "orthonormal"]
