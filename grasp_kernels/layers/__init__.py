"""peft models on the operator, and the leakage of their updates along a subspace.

closed       the common base of closed layers, and the layer on fused experts
projected    the common base of layers on the operator, and peft's own forward where they must
linear       GraspLoRALinear
quantised    the layers over weights stored and multiplied by another library
replacement  a peft model and a subspace -> the same model on these layers, and back
closure      leakage, project_adapter
"""
