"""The divergence from the base model, on chats that the base model makes up.

chats  chats of the base model, from the frame that all training prompts share
kl     the divergence from the base model on the answers, as a loss
"""

from grasp_kernels.regularizer.kl import KLRegularizer, chats_beside

__all__ = ["KLRegularizer", "chats_beside"]
