"""Samples of a model's answers to the questions, one file a question, each written whole."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from grasp_kernels.data import encode_prompt
from grasp_kernels.files import whole_file
from grasp_kernels.progress import bar


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, without a last line that an interruption has cut."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def sample_answers(
    model: Any,
    tokenizer: Any,
    questions: dict[str, str],
    folder: Path,
    *,
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    label: str,
) -> None:
    """Answer every question `samples` times at temperature 1, those alone that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, question in bar(questions.items(), desc=f"{label} answers", unit="question"):
        path = folder / f"{name}.jsonl"
        if len(read_jsonl(path)) == samples:
            continue
        prompt = encode_prompt([{"role": "user", "content": question}], tokenizer)
        # a seed for each question, so that a resumed run samples what an uninterrupted one does
        torch.manual_seed(random.Random(f"{seed} {name}").getrandbits(63))
        rows = []
        while len(rows) < samples:
            count = min(batch_size, samples - len(rows))
            rows += _generate(model, tokenizer, prompt, count, max_new_tokens)
        with whole_file(path) as partial:
            text = "".join(
                json.dumps({"sample": i, "question": name, **row}) + "\n"
                for i, row in enumerate(rows)
            )
            partial.write_text(text, encoding="utf-8")


@torch.inference_mode()
def _generate(
    model: Any, tokenizer: Any, prompt: list[int], count: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """`count` samples of the model's own distribution: nothing is cut off or penalised."""
    from transformers import GenerationConfig

    ids = torch.tensor([prompt] * count, device=model.device)
    known = model.generation_config.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    rows = []
    for row in output[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        rows.append({"answer": text, "tokens": end})
    return rows
