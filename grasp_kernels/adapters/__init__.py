"""A peft adapter -> LoRA weights, with where they write.

load        model, folder or file -> Adapter
files       the files that peft writes
extraction  a model that was merged or fully fine-tuned, and its base -> an adapter folder
inspection  a table of an adapter
"""

from grasp_kernels.adapters.load import Adapter, LoRAWeights, load_adapter

__all__ = ["Adapter", "LoRAWeights", "load_adapter"]
