"""Where a fine-tune moved: LoRA weights, or the base model and the records -> Subspace.

weights            from LoRA weights: stack (blocks and null) -> search -> evidence
self_contrast      from the base model's own answers: frozen_model -> contrast_evidence
union              two subspaces -> one, and how far they agree
"""

from grasp_kernels.identification.self_contrast import identify_self_contrast
from grasp_kernels.identification.union import span, unite
from grasp_kernels.identification.weights import agreement, identify

__all__ = ["agreement", "identify", "identify_self_contrast", "span", "unite"]
