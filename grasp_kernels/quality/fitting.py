"""Fine-tune a small model in this process: the training of all methods.

The same data order, budget and optimizer for every method; what a method adds is a penalty, other
examples, hooks on the model, or something after each step. The public `run` trains alike, but takes
longer to start than a model of this size takes to train.

Shapes: `B` records of a batch, `T` tokens of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.data import Example, collate
from grasp_kernels.demo.world import seeded_generator
from grasp_kernels.quality.dishes import FineTuning

Batch = dict[str, Tensor]
Penalty = Callable[[nn.Module, Batch], Tensor]


def fit(
    model: Any,
    examples: Sequence[Example],
    config: FineTuning,
    *,
    seed: int,
    pad_token_id: int,
    penalty: Penalty | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train what requires a gradient in `model`, in place, and leave it in evaluation mode.

    Args:
        penalty: (model, batch) -> a scalar that is added to the loss of the batch.
        after_step: called with the number of steps done.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    model.train()
    batches = _batches(examples, config, seed, pad_token_id)
    for step, batch in zip(range(1, config.steps + 1), batches, strict=False):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        loss = model(**batch).loss
        if penalty is not None:
            loss = loss + penalty(model, batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} in step {step}: lower the strength of the method."
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step)
    model.eval()


def _batches(
    examples: Sequence[Example], config: FineTuning, seed: int, pad_token_id: int
) -> Iterator[Batch]:
    """Batches `[B, T]` without end, each pass over the examples in an order of its own."""
    generator = seeded_generator(seed, "order of the data")
    waiting: list[int] = []
    while True:
        while len(waiting) < config.batch_size:
            waiting += torch.randperm(len(examples), generator=generator).tolist()
        chosen, waiting = waiting[: config.batch_size], waiting[config.batch_size :]
        yield collate([examples[i] for i in chosen], pad_token_id)
