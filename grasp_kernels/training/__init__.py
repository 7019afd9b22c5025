"""A peft model and a config -> the model on the fast layers -> a trainer that keeps the rest.

apply     put a peft model on GraspLoRALinear, and back
trainer   a mixin for `transformers.Trainer` and the trainers of trl
prompts   rows of a trainer -> examples, and everyday questions in their frame
watch     leakage in the log, and an end to numbers that are not finite
"""
