"""The main job: checkpoint and chat file -> naive adapter -> subspace -> GRASP adapter -> report.

config           every option, with its default; needs the standard library alone
trainer_options  options of transformers that a run takes beside its own
inputs           everything that can be wrong is found before the first training step
stages           the stages in their order: `run`
folder           the output folder: what is finished, who is at work
training         one adapter, with transformers.Trainer
report           numbers, and words (report_text): `Report`
"""
