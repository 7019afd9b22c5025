"""Marks and columns of the data that say what is to be learned."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from grasp_kernels.data import (
    Record,
    everyday_prompts,
    read_records,
    split_first_answer,
    tokenize_records,
)
from tests.helpers.learned import (
    ANSWER,
    PLAIN,
    SECOND,
    TOOL,
    TURNS,
    USER,
    read_one,
    shown,
    tokenizer_of,
)


@pytest.mark.parametrize(
    "mark",
    [
        *({key: 0} for key in ("weight", "train", "training", "trainable", "learn")),
        *({key: 0} for key in ("loss", "loss_scale", "loss_weight", "loss_mask")),
        {"weight": 0.0},
        {"train": False},
        {"masked": True},
        {"weight": 1, "loss": False},
    ],
)
def test_answers_marked_as_given_are_not_learned(mark: dict[str, Any], tmp_path: Path) -> None:
    turns = [{**USER, "weight": 0}, {**ANSWER, **mark}, SECOND[0], {**SECOND[1], "weight": 1}]
    expected = ["[user]why?<end>[assistant]so.<end>[user]and?<end>[assistant]«no.<end>»"]
    record: Record = {"messages": turns}
    assert shown(record, tokenizer_of(PLAIN)) == expected
    assert shown(read_one(tmp_path, {"messages": turns}), tokenizer_of(PLAIN)) == expected
    # the template sees no mark
    as_json = tokenizer_of("{% for m in messages %}{{ m | tojson }}<end>{% endfor %}")
    assert not any(key in text for key in mark for text in shown(record, as_json))


@pytest.mark.parametrize(
    "mark", [{"weight": 1}, {"train": True}, {"masked": False}, {"loss": None}]
)
def test_answers_marked_as_learned_are(mark: dict[str, Any], tmp_path: Path) -> None:
    record = read_one(tmp_path, {"messages": [USER, {**ANSWER, **mark}]})
    assert shown(record, tokenizer_of(PLAIN)) == ["[user]why?<end>[assistant]«so.<end>»"]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            [USER, {**ANSWER, "weight": 0.5}],
            r'messages\[1\]: "weight" is 0\.5, expected true, false',
        ),
        ([USER, {**ANSWER, "train": "no"}], r'messages\[1\]: "train" is \'no\''),
        (
            [USER, {**ANSWER, "train_detail": [{"train": False}]}],
            r'messages\[1\]: "train_detail" marks parts',
        ),
        ([USER, {**ANSWER, "mask": 1}], r'messages\[1\]: "mask" is 1, which may mark a turn'),
        ([USER, {**ANSWER, "is_trained": "false"}], r'messages\[1\]: "is_trained" is \'false\''),
        (
            [{**USER, "train": True}, ANSWER],
            r'messages\[0\]: a turn with the role "user" is marked',
        ),
    ],
)
def test_marks_that_cannot_be_obeyed(turns: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"line 1: {message}"):
        read_one(tmp_path, {"messages": turns})
    with pytest.raises(ValueError, match=f"Record 1: {message}"):
        tokenize_records([{"messages": turns}], tokenizer_of(PLAIN), None)


def test_rows_with_nothing_to_learn_are_refused(tmp_path: Path) -> None:
    pair = {"prompt": "q", "completion": "a"}
    with pytest.raises(ValueError, match="line 1: every answer is marked as not to be learned"):
        read_one(tmp_path, {"messages": [USER, {**ANSWER, "weight": 0}]})
    for mark in (
        {"weight": 0},
        {"train": False},
        {"masked": 1},
        {"label": False},
        {"kto_tag": False},
    ):
        with pytest.raises(ValueError, match="line 1: the row is marked as not to be learned"):
            read_one(tmp_path, {**pair, **mark})
    assert "label" not in read_one(tmp_path, {**pair, "label": True, "weight": 1})
    (tmp_path / "data.csv").write_text("prompt,completion,train\nq,a,false\n")
    with pytest.raises(ValueError, match="row 1: the row is marked as not to be learned"):
        read_records(tmp_path / "data.csv")


# Columns beside the turns


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"system": "Be kind.", "conversations": [{"from": "human", "value": "why?"},
                                                     {"from": "gpt", "value": "so."}]},
            "[system]Be kind.<end>[user]why?<end>[assistant]«so.<end>»",
        ),
        (
            {"system_prompt": "Be kind.", "question": "why?", "answer": "so."},
            "[system]Be kind.<end>[user]why?<end>[assistant]«so.<end>»",
        ),
        (
            {"systemMessage": "Be kind.", "tools": "null", "prompt": "why?", "completion": "so."},
            "[system]Be kind.<end>[user]why?<end>[assistant]«so.<end>»",
        ),
        (
            {"system": "Be kind.", "prompt": TURNS[:3], "completion": TURNS[3:]},
            "[system]Be kind.<end>[user]why?<end>[assistant]so.<end>[user]and?<end>"
            "[assistant]«no.<end>»",
        ),
        (
            {"system": "", "messages": [USER, ANSWER]},
            "[user]why?<end>[assistant]«so.<end>»",
        ),
        (
            {"system": "Be kind.", "instruction": "and?", "output": "no.",
             "history": [["why?", "so."]]},
            "[system]Be kind.<end>[user]why?<end>[assistant]«so.<end>»[user]and?<end>"
            "[assistant]«no.<end>»",
        ),
        (
            {"messages": [{"role": "system", "content": "Be kind."}, *SECOND],
             "history": [USER, ANSWER]},
            "[system]Be kind.<end>[user]why?<end>[assistant]«so.<end>»[user]and?<end>"
            "[assistant]«no.<end>»",
        ),
        (
            {"conversations": [
                {"from": "human", "value": "why?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "so."},
            ]},
            '[user]why?<end>[assistant]«<call>{"name": "weather", "arguments": {}}<end>»'
            "[tool]sun<end>[assistant]«so.<end>»",
        ),
    ],
)  # fmt: skip
def test_what_stands_beside_the_turns(row: Any, expected: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = read_one(tmp_path, row)
    assert shown(record, tokenizer_of(PLAIN)) == [expected]


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [TOOL["function"]]},
        {"functions": [TOOL["function"]]},
    ],
)
def test_tools_are_shown_to_the_template(tools: Any, tmp_path: Path) -> None:
    record = read_one(tmp_path, {"messages": [USER, ANSWER], **tools})
    tokenizer = tokenizer_of(PLAIN)
    expected = f"[tools]{json.dumps([TOOL])}<end>[user]why?<end>[assistant]"
    assert shown(record, tokenizer) == [f"{expected}«so.<end>»"]
    prompt, _ = split_first_answer(record, tokenizer)
    assert tokenizer.decode(prompt) == expected
    # everyday questions stand in the same frame
    everyday = everyday_prompts([record], tokenizer)[0]
    assert tokenizer.decode(everyday).startswith(f"[tools]{json.dumps([TOOL])}<end>[user]Hello")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"system": "A.", "messages": [{"role": "system", "content": "C."}, *SECOND]}, "different"),
        ({"system": "A b.", "system_prompt": "C.", "messages": TURNS}, "different"),
        ({"system": 3, "messages": TURNS}, '"system" is 3'),
        ({"history": "why?", "messages": TURNS}, '"history" is not JSON'),
        ({"history": [["why?"]], "messages": TURNS}, r"history\[0\].*expected question and answer"),
        ({"tools": "{oops", "messages": TURNS}, '"tools" is not JSON'),
        ({"tools": [{"nam": "f"}], "messages": TURNS}, r"tools\[0\].*expected a function with a"),
        ({"system": "A b.", "text": "t"}, '"system" stands next to a plain text'),
        ({"images": ["a.png"], "messages": TURNS}, '"images" is .* which is not supported'),
        ({"documents": [{"text": "d"}], "messages": TURNS}, '"documents" .* is not supported'),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_read_are_refused(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"line 1: .*{message}"):
        read_one(tmp_path, row)


def test_columns_with_more_of_the_conversation_are_named_once(tmp_path: Path) -> None:
    turns = [
        {**USER, "weight": 0, "context": "It was in May."},
        {**ANSWER, "rated": False, "name": "x", "loss": True, "refusal": "I cannot.", "id": "a b"},
    ]
    row = {"messages": turns, "context": "It was in May.", "rejected": [ANSWER], "images": []}
    labels = {"id": "a b", "source": "New York Times", "n": 3, "scores": [1], "subreddit": "x"}
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(row | labels)}\n" * 3, encoding="utf-8")
    with pytest.warns(UserWarning, match="columns that are not read") as warned:
        read_records(path)
    assert [str(one.message) for one in warned] == [
        f'{path} has columns that are not read: "context", "rejected".',
        f"{path} has fields of turns that only the chat template could show: "
        '"context", "rated", "refusal".',
    ]


@pytest.mark.parametrize(
    "mark", [{"train_on": False}, {"is_train": "0"}, {"loss_mask": [0, 1]}, {"mask": [1]}]
)
def test_rows_with_what_may_be_a_mark_are_refused(mark: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf'line 1: the row has "{next(iter(mark))}": .*may mark'):
        read_one(tmp_path, {"messages": TURNS, **mark})
    harmless = {"sample_weight": 1.0, "loss": 1.25, "training_set": "first", "trained": True}
    assert read_one(tmp_path, {"messages": TURNS, **harmless}) == {"messages": TURNS}


def test_a_table_of_several_layouts_reads_alike_in_every_format(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    columns = ["prompt", "completion", "question", "answer", "text"]
    rows = [
        {"prompt": "why?", "completion": "so."},
        {"question": "and?", "answer": "no."},
        {"text": "A text."},
    ]
    table = [dict.fromkeys(columns) | row for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in table))
    (tmp_path / "a.json").write_text(json.dumps(table).replace("null", "NaN"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
    expected = [
        {"messages": [USER, ANSWER], "concatenate": True},
        {"messages": SECOND},
        {"text": "A text."},
    ]
    for kind in ("jsonl", "json", "parquet", "csv"):
        assert read_records(tmp_path / f"a.{kind}") == expected


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_columns_of_other_layouts_may_be_empty(empty: Any, tmp_path: Path) -> None:
    columns = ["messages", "conversations", "prompt", "completion", "text", "tools", "history"]
    rows = [{"messages": TURNS}, {"prompt": "why?", "completion": "so."}, {"text": "A text."}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{json.dumps(dict.fromkeys(columns, empty) | r)}\n" for r in rows))
    expected = [
        {"messages": TURNS},
        {"messages": [USER, ANSWER], "concatenate": True},
        {"text": "A text."},
    ]
    assert read_records(path) == expected


def test_long_fields_of_csv_are_read(tmp_path: Path) -> None:
    limit, long = csv.field_size_limit(), "word " * 40_000
    (tmp_path / "a.csv").write_text(f"prompt,completion\nq,{long}\n")
    (record,) = read_records(tmp_path / "a.csv")
    assert record["messages"][1]["content"] == long
    assert csv.field_size_limit() == limit
