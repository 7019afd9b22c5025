"""What an adapter may read: the directions that training text has and the model's own text has not.

moments   text -> second moments of the inputs of the adapted layers
contrast  moments of both texts -> the rows of A, and how much more the training text has of them
reads     a fresh adapter -> the same with A set to those rows and frozen
"""

from grasp_kernels.reads.reads import ContrastiveReads

__all__ = ["ContrastiveReads"]
