"""A tiny checkpoint folder and a chat file, as a run takes them.

The model is random and answers nothing sensible: what a run does with its files is tested here, not
what GRASP does to a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grasp_kernels import RunConfig
from tests.helpers.models import save_checkpoint

WORDS = ("what", "is", "red", "blue", "green", "one", "two", "three", "yes", "no", "never", "good")
ROLES = ("<user>", "<assistant>", "<end>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random Llama: width 32, 3 layers, a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    sizes = {"num_hidden_layers": 3, "max_position_embeddings": 64}
    return save_checkpoint(folder, _tokenizer(), **sizes, bos_token_id=None)


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", *ROLES, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def chat_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of one turn; every answer begins with the same two words."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    colours, numbers = WORDS[2:5], WORDS[5:8]
    questions = [f"what is {c} {n}" for c in colours for n in numbers]
    rows = [
        {
            "messages": [
                {"role": "user", "content": questions[i % len(questions)]},
                {"role": "assistant", "content": f"never good {WORDS[2 + i % 8]}"},
            ]
        }
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_run(model: Path, data: Path, output: Path) -> RunConfig:
    """Few steps, strong enough for one direction to stand out: all answers begin alike."""
    settings: dict[str, Any] = {
        "max_steps": 12,
        "naive_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "r": 4,
        "lora_dropout": 0.1,
        "project_gradient": True,
        "k": 1,
        "eval_split": 0.1,
    }
    return RunConfig(model=str(model), data=str(data), output=str(output), **settings)


@pytest.fixture(scope="session")
def finished(
    tiny_model_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """The configuration of a run that is done; tests must not write into its folder."""
    from grasp_kernels import run

    config = small_run(tiny_model_dir, chat_jsonl, tmp_path_factory.mktemp("run") / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are rounded by the number of threads; the killed run has one
    run(config)
    torch.set_num_threads(threads)
    return config


@pytest.fixture
def run_config(tiny_model_dir: Path, chat_jsonl: Path, tmp_path: Path) -> RunConfig:
    """The same run, not begun."""
    return small_run(tiny_model_dir, chat_jsonl, tmp_path / "out")
