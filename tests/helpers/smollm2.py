"""The benchmark on a real model, made small: a tiny random model, few records, rows by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.smollm2 import harness, judges
from benchmarks.quality.smollm2.harness import Row
from benchmarks.quality.smollm2.task import Task
from benchmarks.quality.smollm2.tasks import make_task
from tests.helpers.models import save_checkpoint

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = (  # of SmolLM2, as its tokenizer has it
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer() -> Any:
    """Bytes and the two markers of ChatML."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = chat_tokenizer()


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random Llama of width 32 and two layers."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 1024}
    return save_checkpoint(folder, TOKENIZER, **sizes, bos_token_id=TOKENIZER.bos_token_id)


def few(task: Task) -> Task:
    """A task with a little of everything."""
    return replace(
        task,
        records=task.records[:12],
        trained=task.trained[:2],
        held_out=task.held_out[:2],
        near=task.near[:2],
        pairs={name: pairs[:2] for name, pairs in task.pairs.items()},
    )


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """Tasks and prompts cut to a few; one thread, so that sums are rounded alike."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "make_task", lambda *which: few(make_task(*which)))
        patch.setattr(judges, "NEUTRAL", judges.NEUTRAL[:4])
        patch.setattr(judges, "_BARE", judges._BARE[:2])
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


def row_of(method: str, accuracy: float, **other: Any) -> Row:
    """A row with everything that the report shows."""
    return {
        **{"task": "tone", "arm": "factor", "seed": 0, "method": method, "steps": 48, "scale": 1.0},
        **{"loss": 0.5, "seconds": 120.0, "accuracy": accuracy, "accuracy_trained": accuracy},
        **{"drift": 0.5, "near": 0.25, "bare": 0.75, "distinct": 0.9, "words": 12.0},
        "contrast": {"trained phrases": 1.0, "held-out phrases": 2.0, "near": 3.0},
        **{"torch": "2", "device": "cpu", "threads": 1, "dtype": "float32", "learning_rate": 1e-3},
        **{"commit": "abc", "base": "def", "num_documents": 4, "max_new_tokens": 4},
        "lr_scheduler_type": "linear",
        **other,
    }


BASE = row_of("base", 0.0, steps=0, loss=None, contrast={"held-out phrases": 0.5}, seconds=0.0)
NAIVE = [row_of("naive", 0.5), row_of("naive", 0.8, steps=96), row_of("naive", 0.75, steps=144)]
