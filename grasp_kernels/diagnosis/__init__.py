"""Is an adapter contaminated? Base model and adapter -> what it learned unasked, with reasons.

pair        folders and modules -> base model and adapter, lent for measuring
inputs      files, folders and modules -> prompts, answers and a tokenizer
examination one diagnosis at work, on all of the following
directions  the weights (subspace) and what neutral prompts show -> directions of the stream
movement    how far prompts and training answers move along them, and which records most
causal      what steering along them does to the base model, and their removal to the adapter
verdict     numbers -> found, weak or nothing, with reasons
report      numbers -> text and figure
"""

from grasp_kernels.diagnosis.diagnose import Diagnosis, diagnose
from grasp_kernels.diagnosis.examination import Options

__all__ = ["Diagnosis", "Options", "diagnose"]
