"""Movement of the residual stream, held-out loss and logit lens on a tiny random Llama.

`D` residual width, `k` directions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_kernels.effect.stream import mean_loss, measure_movement
from grasp_kernels.effect.tokens import lens
from grasp_kernels.models.architectures import RULES
from grasp_kernels.models.checkpoint import load_model
from grasp_kernels.pipeline import RunConfig
from grasp_kernels.pipeline.inputs import attach_lora

pytest_plugins = ("fixtures_run",)

WIDTH, LAYERS = 32, 3
PROMPTS = [[2, 5, 6, 7, 4], [2, 8, 4]]
OPTIONS = RunConfig(model="m", data="d", output="o", rank=4)


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    return load_model(tiny_model_dir, "auto")


@pytest.fixture
def adapted(model: Any) -> Any:
    """A peft model whose adapter changes layer 1 alone, by what `down_proj` writes."""
    peft_model = attach_lora(model, OPTIONS, "tiny").eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in peft_model.named_parameters():
        if "layers.1.mlp.down_proj.lora_B" in name:
            weight.data.normal_(generator=generator)
    return peft_model


def n_hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_untrained_adapter_moves_nothing(model: Any) -> None:
    peft_model = attach_lora(model, OPTIONS, "tiny").eval()
    moved = measure_movement(peft_model, ["default"], torch.eye(WIDTH), PROMPTS, RULES["llama"])[
        "default"
    ]
    assert moved.along == moved.total == (0.0,) * LAYERS
    assert moved.share == 0.0


def test_movement_begins_at_the_layer_that_was_changed(adapted: Any) -> None:
    basis = torch.eye(WIDTH)
    moved = measure_movement(adapted, ["default"], basis, PROMPTS, RULES["llama"])["default"]
    assert moved.layers == (0, 1, 2)
    assert moved.total[0] == 0.0
    assert min(moved.total[1:]) > 0
    assert moved.along == pytest.approx(moved.total)  # the basis is the whole stream


def test_movement_is_the_mean_over_all_tokens_of_the_hidden_states(adapted: Any) -> None:
    basis = torch.linalg.qr(torch.randn(WIDTH, 2))[0]
    hooks = n_hooks(adapted)
    moved = measure_movement(adapted, ["default"], basis, PROMPTS, RULES["llama"])["default"]
    assert n_hooks(adapted) == hooks
    deltas = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            after = adapted(ids, output_hidden_states=True).hidden_states[2]
            with adapted.disable_adapter():
                before = adapted(ids, output_hidden_states=True).hidden_states[2]
        deltas.append((after - before)[0])
    delta = torch.cat(deltas)
    assert moved.along[1] == pytest.approx((delta @ basis).norm(dim=1).mean().item(), rel=1e-5)
    assert moved.total[1] == pytest.approx(delta.norm(dim=1).mean().item(), rel=1e-5)


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


def test_direction_of_an_unembedding_row_speaks_of_its_token(model: Any) -> None:
    tokenizer = type(
        "Tokenizer", (), {"decode": lambda self, i: str(i[0]), "__len__": lambda s: 17}
    )
    row = model.lm_head.weight[7].detach()
    with torch.no_grad():
        model.lm_head.weight[5] = -2 * row
    (shown,) = lens(model, tokenizer(), row[:, None] / row.norm(), RULES["llama"], 2)
    assert shown["up"][0]["token"] == "7"
    assert shown["down"][0]["token"] == "5"
