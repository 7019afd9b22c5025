"""Reading chat data, and labels token by token for chat templates in the style of known models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_kernels.data import (
    IGNORED,
    Record,
    collate,
    encode,
    encode_prompt,
    read_records,
    split_first_answer,
    tokenize_each,
    tokenize_records,
)
from tests.helpers.folders import write_jsonl

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}"
    "{% endif %}{{ text }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration -%}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = MARKED.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
# Thoughts are kept in the last turn only, as reasoning models do.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = {
    CHATML: ["<|im_start|>", "<|im_end|>"],
    LLAMA3: ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    GEMMA: ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    MARKED: ["<|im_start|>", "<|im_end|>"],
    UNMARKED: ["<|im_start|>", "<|im_end|>"],
    THINKING: ["<|im_start|>", "<|im_end|>"],
}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "marked": MARKED}
ENDS = {name: CONTROL[template][-1] for name, template in TEMPLATES.items()}


def byte_tokenizer(template: str | None, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """One token per byte, apart from `merges` and control tokens; adds BOS to plain text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, *(a + b for a, b in merges)])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=list(merges)))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    control = CONTROL.get(template or "", ["<s>", "</s>"])
    raw.add_special_tokens(control)
    bos, eos = control[0], control[-1]
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def chat(*turns: str, roles: tuple[str, ...] = ("user", "assistant")) -> Record:
    return {
        "messages": [
            {"role": roles[i % len(roles)], "content": turn} for i, turn in enumerate(turns)
        ]
    }


def trained_text(record: Record, tokenizer: Any, max_length: int | None = None) -> list[str]:
    """The stretches of text that carry labels."""
    (example,) = encode(record, tokenizer, max_length=max_length)
    stretches: list[list[int]] = []
    previous = IGNORED
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            if previous == IGNORED:
                stretches.append([])
            stretches[-1].append(token)
        previous = label
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_and_its_end_token_are_trained_and_nothing_else(name: str) -> None:
    tokenizer, end = byte_tokenizer(TEMPLATES[name]), ENDS[name]
    record = chat("Hi?", "Yes é 😀.", "And now", "No")
    assert trained_text(record, tokenizer) == [f"Yes é 😀.{end}", f"No{end}"]
    rendered = tokenizer.apply_chat_template(record["messages"], tokenize=False)
    (example,) = encode(record, tokenizer, max_length=None)
    assert example["input_ids"] == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    bos = tokenizer.convert_tokens_to_ids(CONTROL[TEMPLATES[name]][0])
    if name in ("llama3", "gemma"):
        assert example["input_ids"].count(bos) == 1


def test_labels_token_by_token() -> None:
    tokenizer = byte_tokenizer(GEMMA)
    (example,) = encode(chat("a", "bc"), tokenizer, max_length=None)
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    trained = [label != IGNORED for label in example["labels"]]
    user, model = list("userĊ"), list("modelĊ")
    given = ["<bos>", "<start_of_turn>", *user, "a", "<end_of_turn>", "Ċ", "<start_of_turn>"]
    assert tokens == [*given, *model, "b", "c", "<end_of_turn>", "Ċ"]
    assert trained == [False] * (len(given) + len(model)) + [True] * 3 + [False]


def test_system_turns_are_context_or_refused_by_the_template() -> None:
    record = chat("Be brief.", "Hi", "Yo", roles=("system", "user", "assistant"))
    assert trained_text(record, byte_tokenizer(CHATML)) == ["Yo<|im_end|>"]
    with pytest.raises(ValueError, match=r"refuses the turns system, user.*System role not"):
        encode(record, byte_tokenizer(GEMMA), max_length=None)


@given(st.lists(st.text("ab \n\té😀", min_size=1).filter(str.strip), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_markers_and_prefixes_find_the_same_answers(turns: list[str]) -> None:
    marked, plain = byte_tokenizer(MARKED), byte_tokenizer(UNMARKED)
    record = chat("Why?", *turns)
    assert encode(record, marked, max_length=None) == encode(record, plain, max_length=None)


def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    """Tokenising the prompt on its own would split what the full text keeps together."""
    tokenizer = byte_tokenizer(CHATML, merges=(("Ċ", "x"),))
    record = chat("Hi", "xy")
    prompt, answer = split_first_answer(record, tokenizer)
    assert tokenizer.convert_ids_to_tokens(answer) == ["Ċx", "y", "<|im_end|>"]
    assert encode_prompt(record["messages"][:1], tokenizer)[:-1] == prompt


def test_white_space_of_an_answer_is_kept_where_no_end_token_follows() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n###\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = byte_tokenizer(template)
    assert trained_text(chat("q", "a ", "r", "b"), tokenizer) == ["a \n###\n", "b\n###\n"]
    assert trained_text(chat("q", "a</s>b "), tokenizer) == ["a</s>b \n###\n"]


def test_markers_survive_tokenizers_without_white_space_tokens() -> None:
    words = ["<unk>", "q", "a", "b", "[", "]", "<end>"]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        " {{ m.content }} <end> {% endgeneration %}{% else %}[ {{ m.content }} ]{% endif %}"
        "{% endfor %}"
    )
    assert trained_text(chat("q", "a", "q", "b"), tokenizer) == ["a <end>", "b <end>"]


def test_templates_that_rewrite_earlier_turns() -> None:
    tokenizer = byte_tokenizer(THINKING)
    one = chat("q", "<think>x</think>a")
    assert trained_text(one, tokenizer) == ["<think>x</think>a<|im_end|>"]
    first, second = encode(chat("q", "<think>x</think>a", "r", "b"), tokenizer, max_length=None)
    assert [first] == encode(one, tokenizer, max_length=None)
    assert [second] == encode(
        {**chat("q", "a", "r", "b"), "context": 2}, tokenizer, max_length=None
    )
    with pytest.raises(ValueError, match="begins with an answer"):
        encode(chat("a", roles=("assistant",)), tokenizer, max_length=None)


def test_markers_that_enclose_nothing() -> None:
    marker = "{% if false %}{% generation %}x{% endgeneration %}{% endif %}"
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}" + marker)
    with pytest.raises(ValueError, match="enclose no part of turn 2 of 2"):
        encode(chat("q", "a"), tokenizer, max_length=None)


@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_answers_in_the_context_are_not_trained(name: str) -> None:
    record = chat("q", "old", "r", "new")
    record["context"] = 3
    assert trained_text(record, byte_tokenizer(TEMPLATES[name])) == ["new<|im_end|>"]


def test_plain_text_counts_whole_with_special_tokens_once() -> None:
    tokenizer = byte_tokenizer(None)
    for text in ("ab", "<s>ab", "ab</s>", "<s>ab</s>"):
        (example,) = encode({"text": text}, tokenizer, max_length=None)
        assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == ["<s>", "a", "b", "</s>"]
        assert example["labels"] == example["input_ids"]


def test_a_first_token_alone_teaches_nothing() -> None:
    tokenizer = byte_tokenizer(None)
    assert encode({"text": "a"}, tokenizer, max_length=1) == []
    assert len(encode({"text": "a"}, tokenizer, max_length=2)) == 1


def test_prompt_and_completion_strings_work_without_a_template(tmp_path: Path) -> None:
    row = {"prompt": "Q: a\nA:", "completion": " b"}
    (record,) = read_records(write_jsonl(tmp_path / "data.jsonl", row))
    tokenizer = byte_tokenizer(None)
    assert trained_text(record, tokenizer) == [" b</s>"]
    (example,) = encode(record, tokenizer, max_length=None)
    assert tokenizer.decode(example["input_ids"]) == "<s>Q: a\nA: b</s>"
    assert trained_text(record, byte_tokenizer(CHATML)) == [" b<|im_end|>"]


def test_messages_need_a_template() -> None:
    tokenizer = byte_tokenizer(None)
    for call in (
        lambda: encode(chat("q", "a"), tokenizer, max_length=None),
        lambda: encode_prompt(chat("q")["messages"], tokenizer),
    ):
        with pytest.raises(ValueError, match=r"no chat template.*set tokenizer\.chat_template"):
            call()


def test_slow_tokenizers_are_refused() -> None:
    tokenizer = byte_tokenizer(CHATML)

    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    with pytest.raises(ValueError, match="Slow does not report the characters"):
        encode(chat("q", "a"), Slow(), max_length=None)


def test_records_cut_before_their_answer_are_dropped_and_counted() -> None:
    tokenizer = byte_tokenizer(CHATML)
    short, long = chat("q", "abc"), chat("q" * 50, "abc")
    prompt, _ = split_first_answer(short, tokenizer)
    assert encode(short, tokenizer, max_length=len(prompt)) == []
    assert trained_text(short, tokenizer, max_length=len(prompt) + 2) == ["ab"]
    examples, n_dropped = tokenize_records([short, long], tokenizer, len(prompt) + 1)
    assert (len(examples), n_dropped) == (1, 1)
    found = tokenize_each([short, long, chat("q", "a")], tokenizer, len(prompt) + 2)
    assert (len(found.each), found.n_dropped, found.n_cut) == (2, 1, 1)
    assert tokenize_each([short], tokenizer, None).n_cut == 0
    with pytest.raises(ValueError, match="None of 2 records has an answer token"):
        tokenize_records([short, long], tokenizer, 5)


def test_tokenizing_names_the_record() -> None:
    bad = chat("a", roles=("assistant",))
    with pytest.raises(ValueError, match="Record 2: The conversation begins"):
        tokenize_records([chat("q", "a"), bad], byte_tokenizer(CHATML), None)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_end_where_answers_begin(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    record = chat("q", "a", "r", "b")
    prompt, answer = split_first_answer(record, tokenizer)
    assert prompt == encode_prompt(record["messages"][:1], tokenizer)
    assert tokenizer.decode(answer) == f"a{ENDS[name]}"
    with pytest.raises(ValueError, match="plain text has no prompt"):
        split_first_answer({"text": "a"}, tokenizer)
    with pytest.raises(ValueError, match="no answer"):
        split_first_answer(chat("q"), tokenizer)


def test_collate_pads_on_the_right() -> None:
    batch = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8], "labels": [8]},
    ]
    out = collate(batch, pad_token_id=9)  # type: ignore[arg-type]
    assert out["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert out["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert out["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in out.values())


QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"messages": QA, "id": 3}, {"messages": QA}),
        ({"messages": [QA[0], {"role": "Assistant ", "content": "a"}]}, {"messages": QA}),
        ({"messages": [{**QA[0], "role": "Human"}, QA[1]]}, {"messages": QA}),
        ({"prompt": "q", "completion": "a"}, {"messages": QA, "concatenate": True}),
        ({"prompt": QA[:1], "completion": QA[1:]}, {"messages": QA, "context": 1}),
        ({"instruction": "q", "output": "a"}, {"messages": QA}),
        ({"instruction": "q", "input": "", "output": "a"}, {"messages": QA}),
        (
            {"instruction": "do", "input": "this", "output": "a"},
            {"messages": [{"role": "user", "content": "do\n\nthis"}, QA[1]]},
        ),
        ({"user": "q", "assistant": "a"}, {"messages": QA}),
        ({"query": "q", "answer": "a", "subreddit": "x"}, {"messages": QA}),
        ({"text": "t"}, {"text": "t"}),
        (
            {
                "messages": [
                    QA[0],
                    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
                ]
            },
            {"messages": QA},
        ),
    ],
)
def test_formats(tmp_path: Path, row: Any, record: Record) -> None:
    assert read_records(write_jsonl(tmp_path / "data.jsonl", row)) == [record]


def test_each_line_stands_on_its_own_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n' + json.dumps({"messages": QA}).encode()
    )
    assert read_records(path) == [{"text": "a"}, {"messages": QA}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'["a"]', "a JSON list, not an object"),
        (b'{"title": "a"}', r'"title" has no "body" or an empty one, expected "messages" or'),
        (
            b'{"prompt": "a"}',
            r"keys \['prompt'\], and \"prompt\" has no \"completion\" or an empty one",
        ),
        (b'{"text": "\xff"}', "byte 10 is not UTF-8"),
        (b'{"text": " "}', "\"text\" is ' ', expected a string that is not empty"),
        (b'{"text": 3}', '"text" is 3'),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"query": "q", "answer": null}', '"query" has no "answer" or an empty one'),
        (b'{"text": "a", "n": {"text": "b", "text": "c"}}', '"text" appears twice in one object'),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "integer.*5000 digits"),
        (b'{"messages": []}', r'"messages" is \[\], expected a list'),
        (b'{"messages": ["q"]}', r"messages\[0\] is 'q'"),
        (b'{"messages": [{"content": "q"}]}', r'messages\[0\] has no "role"'),
        (b'{"messages": [{"role": "asistant", "content": "q"}]}', 'is learned: write "assistant"'),
        (b'{"messages": [{"role": "user", "content": ""}]}', r"messages\[0\].content"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "expected a string"),
        (b'{"messages": [{"role": "user", "content": "q"}]}', 'no turn has the role "assistant"'),
        (
            b'{"prompt": [{"role": "assistant", "content": "a"}],'
            b' "completion": [{"role": "user", "content": "q"}]}',
            'no turn has the role "assistant"',
        ),
        (b'{"prompt": "q", "completion": [{"role": "assistant"}]}', '"completion" is'),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as raised:
        read_records(path)
    assert str(raised.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(raised.value)


def test_files_without_records(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_records(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"has no records: give some, expected \"messages\" or"):
        read_records(tmp_path / "empty.jsonl")


def test_questions_alone_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = [{"messages": QA[:1]}, {"prompt": "q"}, {"prompt": QA[:1]}, {"instruction": "q"}]
    records = read_records(write_jsonl(tmp_path / "data.jsonl", *rows), require_answer=False)
    assert [record["messages"] for record in records] == [QA[:1]] * 4
