"""A peft adapter -> LoRA weights with their sites.

load        model, folder or file -> Adapter
files       peft's files
portable    an adapter -> the same for other software, and what that does with an adapter
extraction  a merged or fully fine-tuned model and its base -> an adapter folder
"""

from grasp_kernels.adapters.files import LoRAWeights
from grasp_kernels.adapters.load import Adapter, load_adapter

__all__ = ["Adapter", "LoRAWeights", "load_adapter"]
