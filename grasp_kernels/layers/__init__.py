"""peft models on the operator, and what their updates do along a subspace.

projected    what the layers have in common: bases, closure, peft's own forward where they must
linear       GraspLoRALinear
replacement  replace_lora_layers, restore_lora_layers
closure      leakage, project_adapter
"""
