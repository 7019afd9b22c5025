"""LoRA weights -> the subspace in which a fine-tune moved, its file and its picture.

basis              orthonormal bases by module name; header checks what a file says of them
stack              weights of adapters -> one matrix, and its null
search             the matrix -> directions, and what each test of them gave
identification     adapters -> Subspace
report             a Subspace -> text and figure
"""

from grasp_kernels.subspace.basis import Subspace, check_basis, check_subspace, orthonormal
from grasp_kernels.subspace.identification import identify

__all__ = ["Subspace", "check_basis", "check_subspace", "identify", "orthonormal"]
