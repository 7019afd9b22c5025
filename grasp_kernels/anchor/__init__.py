"""The own-text anchor: on text that the base model made up, the retrained model goes on as it does.

own_text     documents that the base model makes up, from the frame that all prompts share
look_alikes  positions that look like those where training answers are decided, which are left out
anchor       the divergence from the base model on the rest, as a loss and for `Trainer`
"""

from grasp_kernels.anchor.anchor import OwnTextAnchor

__all__ = ["OwnTextAnchor"]
