"""The closed factors of many adapters at once: reference, one kernel launch, and their cache."""
