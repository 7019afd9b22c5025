"""Documents that the base model makes up itself.

They begin with what all training prompts begin with: the beginning of text, and in a chat format
the frame up to where the first user speaks, from where an instruction-tuned model makes up the
user's turn and its own answer (as Xu et al. 2024, arXiv 2406.08464, had it). Prompts that all begin
with the same instruction hand that on too, and then the text is about their task. The text is what
the model knows apart from the training data, and nobody has to collect it.

Shapes: `M` documents, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.data import Example
from grasp_kernels.identification.frozen_model import generate_answers

UNTRAINED = -100  # the label of a token that is not learned


def make_documents(
    base: Any,
    examples: Sequence[Example],
    *,
    count: int,
    length: int,
    batch_size: int,
    generator: torch.Generator,
    progress: bool = False,
) -> Tensor:
    """Token ids int64 `[count, length]`, sampled at temperature 1 from the frame of `examples`.

    Where the prompts have no frame in common, each begins as one of them, drawn at random.

    Args:
        base: the frozen base model, as `frozen_base` lends it.
        length: as `document_length` says.
    """
    frame = common_frame(examples)
    drawn = torch.randint(len(examples), (count,), generator=generator).tolist()
    starts = [frame or examples[i]["input_ids"][:1] for i in drawn]
    texts = generate_answers(
        base,
        starts,
        max_new_tokens=length - len(starts[0]),
        batch_size=batch_size,
        end_ids=(),  # the end of a turn is not the end of the text
        generator=generator,
        progress="text of the base model" if progress else None,
    )
    return torch.tensor([start + text for start, text in zip(starts, texts, strict=True)])


def document_length(examples: Sequence[Example], max_length: int) -> int:
    """Tokens of a document: as many as the longest example has, `max_length` at most.

    Raises:
        ValueError: there are no examples, or their frame alone is as long.
    """
    if not examples:
        raise ValueError("There are no examples to keep apart: give the training data.")
    length = min(max_length, max(len(example["input_ids"]) for example in examples))
    frame = max(1, len(common_frame(examples)))
    if frame >= length:
        raise ValueError(
            f"The prompts begin with {frame} tokens that a document begins with too, and it has "
            f"{length} in all: give a larger length than {max_length} (--own-length of a run), or "
            "longer examples."
        )
    return length


def common_frame(examples: Sequence[Example]) -> list[int]:
    """What the prompts of all examples begin with; it may be nothing, and is no whole prompt."""
    prompts = [_prompt(example) for example in examples]
    first, shortest = prompts[0], min(map(len, prompts))
    different = (i for i in range(shortest) if any(p[i] != first[i] for p in prompts))
    return first[: next(different, shortest - 1)]


def _prompt(example: Example) -> list[int]:
    """The tokens before the first one that is learned, or the first one."""
    ids, labels = example["input_ids"], example["labels"]
    learned = next((i for i, label in enumerate(labels) if label != UNTRAINED), len(ids))
    return ids[: max(1, learned)]
