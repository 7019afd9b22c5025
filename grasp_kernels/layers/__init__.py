"""peft models on the operator, and what their updates do along a subspace.

linear       GraspLoRALinear
replacement  replace_lora_layers, restore_lora_layers
closure      leakage, project_adapter
"""
