"""The main job: checkpoint and chat file -> naive adapter -> retrained adapter -> report.

config           every option with its default; needs only the standard library
trainer_options  options of transformers, in addition to those of a run
inputs           every check that can be made before the first training step
stages           the stages in their order: `run`
folder           the output folder: finished stages, and a lock
interrupts       Ctrl-C between two steps
training         one adapter, with transformers.Trainer
report           numbers, and their text (report_text): `Report`
"""
