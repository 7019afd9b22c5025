"""Neutral prompts: built in, from files, and in the frame of training prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grasp_kernels.data import everyday_prompts, neutral_prompts
from grasp_kernels.data.neutral import NEUTRAL_PROMPTS

pytest_plugins = ("tests.helpers.runs",)


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_neutral_prompts_end_where_the_answer_begins(tokenizer: Any, tmp_path: Path) -> None:
    question = ["<user>", "what", "is", "red", "<end>", "<assistant>"]
    lines = tmp_path / "lines.txt"
    lines.write_text("what is red\n\nwhat is blue\n", encoding="utf-8")
    records = tmp_path / "records.jsonl"
    records.write_text(
        '{"prompt": "what is red", "completion": "never"}\n{"text": "what is red"}\n'
        '{"messages": [{"role": "user", "content": "what is red"}]}\n',
        encoding="utf-8",
    )
    from_lines = neutral_prompts(lines, tokenizer)
    assert tokenizer.convert_ids_to_tokens(from_lines[0]) == question
    assert len(from_lines) == 2
    assert neutral_prompts(records, tokenizer) == [from_lines[0]] * 3
    assert len(neutral_prompts(None, tokenizer)) == len(NEUTRAL_PROMPTS)
    lines.write_text("what is red\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"in .*lines\.txt are 1, with 0 empty: give at least 2"):
        neutral_prompts(lines, tokenizer)


def test_neutral_prompts_come_from_every_file_that_data_comes_from(
    tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    # U+2028, as JavaScript writes it, ends no line
    rows = [{"prompt": "what is\u2028red", "completion": "never"}, {"prompt": "what is blue"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name in ("a.jsonl", "a.txt", "a"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    for name in ("a.json", "array.txt"):
        (tmp_path / name).write_text(f"\ufeff {json.dumps(rows, indent=1)}", encoding="utf-8")
    (tmp_path / "a.csv").write_text(
        'prompt,completion\n"what is\u2028red",never\nwhat is blue,\n', encoding="utf-8"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "plain.txt").write_bytes("what is\u2028red\r\n\r\nwhat is blue".encode())
    (tmp_path / "bracket.txt").write_text("[what\nwhat is blue", encoding="utf-8")
    expected = [
        tokenizer.convert_tokens_to_ids(["<user>", "what", "is", colour, "<end>", "<assistant>"])
        for colour in ("red", "blue")
    ]
    files = [path for path in tmp_path.iterdir() if path.name != "bracket.txt"]
    assert len(files) == 8
    for path in files:
        assert neutral_prompts(path, tokenizer) == expected, path.name
    assert neutral_prompts(tmp_path / "bracket.txt", tokenizer)[1] == expected[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"what\nis \xff", r"a\.txt: byte 8 is not UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl, line 1: byte 10 is not UTF-8"),
        ("a.jsonl", b"what is red", r"a\.jsonl, line 1: not JSON"),
        ("a.txt", b'{"prompt": "what"}\nwhat', r"a\.txt, line 2: not JSON"),
        ("a.csv", b"color\nred\n", r"a\.csv, row 1: unknown keys \['color'\]"),
        ("a.txt", b'{\n "prompt": "what"\n}', r"a\.txt, line 1: not JSON"),
        ("a.txt", b'[{"prompt": "what"}, {"pro', r"a\.txt: not JSON"),
        ("a", b'["what is red"]', r"a, row 1: a JSON str, not an object"),
        (
            "a.tsv",
            b"prompt\tcompletion\nwhat\tred",
            r"a\.tsv: a file that ends in \.tsv is not read",
        ),
    ],
)
def test_malformed_files_of_neutral_prompts_are_named(
    name: str, content: bytes, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        neutral_prompts(tmp_path / name, tokenizer)


def test_neutral_prompts_without_a_chat_template_are_plain(tokenizer: Any, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("what is red\nwhat is blue", encoding="utf-8")
    tokenizer.chat_template = None
    ids, _ = neutral_prompts(lines, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["what", "is", "red"]


def test_empty_file_of_neutral_prompts_is_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        neutral_prompts(tmp_path / "empty.txt", tokenizer)


def test_everyday_questions_stand_under_what_comes_before_the_first_question(
    tokenizer: Any,
) -> None:
    turns = [("system", "blue"), ("user", "what is red"), ("assistant", "red"), ("user", "red")]
    record: Any = {"messages": [{"role": role, "content": text} for role, text in turns]}
    prompts = everyday_prompts([record], tokenizer)
    assert len(prompts) == len(NEUTRAL_PROMPTS)
    for prompt, neutral in zip(prompts, neutral_prompts(None, tokenizer), strict=True):
        words = tokenizer.convert_ids_to_tokens(prompt)
        assert words == ["<unk>", "blue", "<end>", *tokenizer.convert_ids_to_tokens(neutral)]


@pytest.mark.parametrize(
    "record",
    [
        {"text": "what is red"},
        {"messages": [{"role": "assistant", "content": "red"}]},
        {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "is"}]},
    ],
)
def test_everyday_questions_alone_where_nothing_comes_before(record: Any, tokenizer: Any) -> None:
    assert everyday_prompts([record], tokenizer) == neutral_prompts(None, tokenizer)
