"""Made-up examples of a training, and a regulariser on random documents."""

from typing import Any

import torch

import grasp_kernels as gk
from grasp_kernels.data import Example
from tests.helpers.models import tiny_model

FRAME, VOCABULARY = [1, 2], 32


def example(prompt: list[int], answer: list[int]) -> Example:
    """One whose answer alone counts."""
    return Example(input_ids=prompt + answer, labels=[-100] * len(prompt) + answer)


def examples(count: int = 40) -> list[Example]:
    """Prompts with one frame, a word of their own, and an answer that is always the same."""
    drawn = torch.randint(5, VOCABULARY, (count,)).tolist()
    return [example([*FRAME, word, 3], [4, 4, 4]) for word in drawn]


def regularizer(**options: Any) -> gk.KLRegularizer:
    """On six documents of eight tokens, most of which count."""
    documents = torch.randint(5, VOCABULARY, (6, 8))
    counted = torch.rand(6, 8) < 0.7
    return gk.KLRegularizer.of(
        tiny_model(), documents, counted, **{"kl_coef": 1.0, "batch_size": 4, **options}
    )
