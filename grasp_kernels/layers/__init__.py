"""peft models on the operator, and what their updates do along a subspace.

closed       what every closed layer does
projected    what the layers on the operator have in common, and peft's own forward where they must
linear       GraspLoRALinear
quantised    the same over weights that another library stores and multiplies
experts      LoRA on the fused parameters of experts
replacement  replace_lora_layers, restore_lora_layers
closure      leakage, project_adapter
"""
