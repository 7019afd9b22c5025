"""peft models on the operator, and what their updates do along a subspace.

closed       what every closed layer does
linear       GraspLoRALinear
experts      LoRA on the fused parameters of experts
replacement  replace_lora_layers, restore_lora_layers
closure      leakage, project_adapter
"""
