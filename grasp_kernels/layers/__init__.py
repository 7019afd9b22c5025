"""peft models on the operator, and what their updates do along a subspace.

projected    what the layers have in common: bases, closure, peft's own forward where they must
linear       GraspLoRALinear
quantised    the same over weights that another library stores and multiplies
replacement  replace_lora_layers, restore_lora_layers
closure      leakage, project_adapter
"""
