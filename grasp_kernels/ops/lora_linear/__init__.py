"""The LoRA linear layer with gradient projection: specification, backends, registration."""
