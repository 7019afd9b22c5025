"""A peft model and a config -> the model on the fast layers -> a trainer that keeps the rest.

apply.py     put a peft model on GraspLoRALinear, and back
trainer.py   a mixin for `transformers.Trainer` and the trainers of trl
"""
