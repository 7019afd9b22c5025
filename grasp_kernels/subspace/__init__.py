"""Orthonormal bases by module name, saved as safetensors; knows no adapter and no layer."""

from grasp_kernels.subspace.basis import (
    SCOPES,
    SIDES,
    Subspace,
    check_basis,
    check_subspace,
    orthonormal,
)

__all__ = ["SCOPES", "SIDES", "Subspace", "check_basis", "check_subspace", "orthonormal"]
