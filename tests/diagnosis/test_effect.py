"""Held-out loss of a tiny random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_kernels.diagnosis.effect import mean_loss
from grasp_kernels.models.checkpoint import load_model

pytest_plugins = ("tests.helpers.runs",)


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    return load_model(tiny_model_dir, "auto")


def test_held_out_loss_is_that_of_the_model_over_all_answer_tokens(model: Any) -> None:
    examples: Any = [
        {"input_ids": [2, 5, 6, 3, 7, 4], "labels": [-100] * 4 + [7, 4]},
        {"input_ids": [2, 5, 3, 8, 9, 10, 4], "labels": [-100] * 3 + [8, 9, 10, 4]},
    ]
    total = sum(
        model(
            input_ids=torch.tensor([e["input_ids"]]), labels=torch.tensor([e["labels"]])
        ).loss.item()
        * n
        for e, n in zip(examples, (2, 4), strict=True)
    )
    for batch_size in (1, 2):
        loss = mean_loss(model, examples, batch_size=batch_size, pad_token_id=0)
        assert loss == pytest.approx(total / 6, rel=1e-5)
