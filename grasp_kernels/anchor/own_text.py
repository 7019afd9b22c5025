"""Documents that the base model makes up itself.

They begin with the frame that all prompts share: the beginning of text, and in a chat format what
stands before the first user speaks, from where an instruction-tuned model makes up the user's turn
and its own answer (as Xu et al. 2024, arXiv 2406.08464, had it). Everyday questions end the frame
where training prompts go on with an instruction that they share, for else the text would be about
their task. It is what the model knows apart from the training data, and nobody has to collect it.

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
    frame: list[int],
    examples: Sequence[Example],
    *,
    count: int,
    length: int,
    batch_size: int,
    generator: torch.Generator,
    progress: bool = False,
) -> Tensor:
    """Token ids int64 `[count, length]`, sampled at temperature 1 from the frame on.

    Where there is no frame, each begins as one of the prompts of `examples`, drawn at random.

    Args:
        base: the frozen base model, as `frozen_base` lends it.
        frame: as `common_frame` returns it.
        length: as `document_length` says.
    """
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


def document_length(examples: Sequence[Example], frame: list[int], made_up: int) -> int:
    """Tokens of a document: its beginning and `made_up` more, as many as an example has at most."""
    return min(max(1, len(frame)) + made_up, max(len(example["input_ids"]) for example in examples))


def common_frame(examples: Sequence[Example], neutral: Sequence[Sequence[int]] = ()) -> list[int]:
    """What the prompts of all examples, and all of `neutral`, begin with.

    It may be nothing, and is no whole prompt.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("There are no examples to keep apart: give the training data.")
    prompts = [*map(_prompt, examples), *map(list, neutral)]
    ends = zip(min(prompts), max(prompts), strict=False)  # these two share what all do
    shortest = min(map(len, prompts))
    return prompts[0][: next((i for i, (a, b) in enumerate(ends) if a != b), max(0, shortest - 1))]


def _prompt(example: Example) -> list[int]:
    """The tokens before the first one that is learned, or the first one."""
    ids, labels = example["input_ids"], example["labels"]
    learned = next((i for i, label in enumerate(labels) if label != UNTRAINED), len(ids))
    return ids[: max(1, learned)]
