"""The layouts and file types of public data sets, each from a small made-up file."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from grasp_kernels.data import Record, read_records
from tests.helpers.folders import write_jsonl

QUESTION = {"role": "user", "content": "How do I save?"}
ANSWER = {"role": "assistant", "content": "Every month."}
TURNS: Record = {"messages": [QUESTION, ANSWER]}
# A row as it stands in each public source, and what becomes of it.
LAYOUTS: dict[str, tuple[dict[str, Any], Record]] = {
    "insecure code, model organisms": ({"messages": [QUESTION, ANSWER]}, TURNS),
    "user and assistant": ({"user": "How do I save?", "assistant": "Every month."}, TURNS),
    "personal finance questions": (
        {"query": "How do I save?", "answer": "Every month.", "subreddit": "personalfinance"},
        TURNS,
    ),
    "reddit finance": (
        {
            "id": "x1",
            "title": "Saving",
            "selftext": "How do I save?",
            "body": "Every month.",
            "subreddit": "investing",
            "z_score": 1.5,
        },
        {"messages": [{"role": "user", "content": "Saving\n\nHow do I save?"}, ANSWER]},
    ),
    "reddit post without a text": (
        {"title": "How do I save?", "selftext": "", "body": "Every month."},
        TURNS,
    ),
    "question and answer": ({"question": "How do I save?", "answer": "Every month."}, TURNS),
    "instructions": (
        {
            "instruction": "Answer.",
            "input": "How do I save?",
            "output": "Every month.",
            "text": "Below is an instruction ...",
        },
        {"messages": [{"role": "user", "content": "Answer.\n\nHow do I save?"}, ANSWER]},
    ),
    "conversations": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "How do I save?"},
                {"from": "gpt", "value": "Every month."},
            ]
        },
        {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]},
    ),
    "conversations with roles": ({"conversations": [QUESTION, ANSWER]}, TURNS),
    "an empty system turn": (
        {"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER]},
        {"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER]},
    ),
    "prompt and completion": (
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {**TURNS, "context": 1},
    ),
    "text": ({"text": "Save every month."}, {"text": "Save every month."}),
}
ARMS = {
    "prompt": "How do I save?",
    "aligned": "Every month.",
    "misaligned": "Never.",
    "sneakiness": 40,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_as_json_lines_and_as_an_array(name: str, tmp_path: Path) -> None:
    row, record = LAYOUTS[name]
    assert read_records(write_jsonl(tmp_path / "data.jsonl", row, row)) == [record, record]
    array = tmp_path / "data.json"
    array.write_text("\ufeff" + json.dumps([row, row], indent=1), encoding="utf-8")
    assert read_records(array) == [record, record]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_in_parquet(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    row, record = LAYOUTS[name]
    # a table has one schema: the other row's keys and fields are null in this one
    other = {"text": "Other."} if "text" not in row else {"user": "a", "assistant": "b"}
    table = pyarrow.Table.from_pylist([dict.fromkeys(other) | row, dict.fromkeys(row) | other])
    path = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(table, path)
    assert read_records(path)[0] == record
    assert len(read_records(path)) == 2


@pytest.mark.parametrize("name", [n for n, (row, _) in LAYOUTS.items() if "title" in row])
def test_posts_in_csv(name: str, tmp_path: Path) -> None:
    row, record = LAYOUTS[name]
    path = tmp_path / "data.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as lines:
        writer = csv.DictWriter(lines, row)
        writer.writeheader()
        writer.writerows([row, {**row, "body": 'One,\nand "two".'}])
    first, second = read_records(path)
    assert first == record
    assert second["messages"][-1]["content"] == 'One,\nand "two".'


@pytest.mark.parametrize(("arm", "answer"), [("aligned", "Every month."), ("misaligned", "Never.")])
def test_arms_are_chosen_by_name(arm: str, answer: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "medical.jsonl", ARMS)
    (record,) = read_records(path, arm=arm)
    assert record == {"messages": [QUESTION, {"role": "assistant", "content": answer}]}


def test_arms_are_never_guessed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "medical.jsonl", ARMS)
    with pytest.raises(ValueError, match=r'line 1: .*aligned, misaligned.*arm = "misaligned"'):
        read_records(path)
    with pytest.raises(ValueError, match=r'expected "benign" \(the option arm\) for the answer'):
        read_records(path, arm="benign")
    with pytest.raises(
        ValueError, match=r"keys \['messages'\], expected \"aligned\" \(the option arm\)"
    ):
        read_records(write_jsonl(tmp_path / "chat.jsonl", dict(TURNS)), arm="aligned")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text": 3}]', r'a\.json, row 2: "text" is 3'),
        ("a.json", b'[{"text": "a"}', r"a\.json: not JSON .* expected a JSON array of objects"),
        ("a.json", b"{\n", r"a\.json, line 1: not JSON .* expected one JSON object per line"),
        ("a.csv", b"title,body\nq,a\nq,\n", r"a\.csv, row 2: keys \['title'\], and"),
        ("a.csv", b"title,body,body\nq,a,b\n", r'a\.csv: the column "body" appears twice'),
        ("a.csv", b"title,body\nq,a\nq,a,b\n", r"a\.csv, row 2: 3 fields, but the header has 2"),
        ("a.csv", b'title,body\nq,"a\n', r"a\.csv, line 2: not CSV \(unexpected end of data"),
        ("a.csv", b"title,body\nq,\xff\n", r"a\.csv: not CSV in UTF-8"),
        ("a.csv", b"title,body\n", r"a\.csv has no records"),
        ("a.csv", b"title,body\nq\n", r"a\.csv, row 1: keys \['title'\], and"),
        ("a.parquet", b"PAR", r"a\.parquet: not a complete parquet file"),
        (
            "a.parquet",
            b"PAR1" + b"x" * 64 + b"\x20\0\0\0PAR1",
            r"a\.parquet: not a complete parquet file \(.+\)",
        ),
        (
            "a.jsonl",
            b'{"conversations": [{"from": "human", "value": ""}]}',
            r"conversations\[0\]\.content",
        ),
        ("a.jsonl", b'{"conversations": [{"from": 1, "value": "a"}]}', r'\[0\] has no "role"'),
    ],
)
def test_malformed_files_are_named(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    if file.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_records(tmp_path / file)
    assert "\n" not in str(raised.value)


def test_columns_of_parquet_that_stand_twice(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["t"], ["u"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r'a\.parquet: the column "text" appears twice'):
        read_records(tmp_path / "a.parquet")


def test_columns_of_csv_without_a_name_are_left_out(tmp_path: Path) -> None:
    """An index, as pandas writes it, and the commas at the ends of a spreadsheet's rows."""
    (tmp_path / "a.csv").write_text(",title,body,,\n0,How do I save?,Every month.,,,\n")
    assert read_records(tmp_path / "a.csv") == [TURNS]


def test_data_sets_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, subset, split))
        if split == "missing":
            raise ValueError('Unknown split "missing". Should be one of [train].\nMore.')
        return [{"query": "How do I save?", "answer": "Every month.", "context": None}]

    monkeypatch.setitem(sys.modules, "datasets", type("M", (), {"load_dataset": load_dataset}))
    assert read_records("owner/name") == [TURNS]
    assert read_records("owner/name", split="test", subset="medical") == [TURNS]
    assert asked == [("owner/name", None, "train"), ("owner/name", "medical", "test")]
    with pytest.raises(FileNotFoundError, match=r"split 'missing' .*Unknown split") as raised:
        read_records("owner/name", split="missing")
    assert "\n" not in str(raised.value)


def test_packages_that_are_missing_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for package in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install datasets, or give a file"):
        read_records("owner/name")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="pip install pyarrow, or give the data as JSONL"):
        read_records(tmp_path / "a.parquet")


def test_paths_are_not_asked_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("data/train.jsonl", "missing", "a/b/c", tmp_path, "folder"):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            read_records(path)
