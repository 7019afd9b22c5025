"""A peft adapter -> LoRA weights with their sites.

load        model, folder or file -> Adapter
files       the files that peft writes
checkpoint  safetensors files, whole or in shards, of an adapter or a model
base_model  model type, depth and norm gains of the model below
extraction  a model that was merged or fully fine-tuned, and its base -> an adapter folder
model_weights  the weights of a whole model, of which that is made
inspection  a table and a picture of an adapter
"""

from grasp_kernels.adapters.load import Adapter, LoRAWeights, load_adapter

__all__ = ["Adapter", "LoRAWeights", "load_adapter"]
