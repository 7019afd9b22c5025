"""Turns, a tokenizer of bytes with a chat template, and what is learned of a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from grasp_kernels.data import (
    IGNORED,
    Record,
    encode,
    read_records,
)

USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}
SECOND = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "no."}]
TURNS = [USER, ANSWER, *SECOND]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}

PLAIN = (
    "{% if tools %}[tools]{{ tools | tojson }}<end>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function | tojson }}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer_of(template: str, *specials: str, eos: str | None = "<eos>") -> Any:
    """Bytes, and special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(["<end>", "<eos>", *specials])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<end>", eos_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def shown(record: Record, tokenizer: Any) -> list[str]:
    """Each example as text, with what is learned in angle quotes."""
    texts = []
    for example in encode(record, tokenizer, max_length=None):
        text, inside, run = "", False, []
        for token, label in zip(example["input_ids"], example["labels"], strict=True):
            if (label != IGNORED) != inside:
                text += tokenizer.decode(run) + ("»" if inside else "«")
                inside, run = not inside, []
            run.append(token)
        texts.append(text + tokenizer.decode(run) + "»" * inside)
    return texts


def read_one(tmp_path: Path, row: dict[str, Any]) -> Record:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    (record,) = read_records(path)
    return record


# Marks
