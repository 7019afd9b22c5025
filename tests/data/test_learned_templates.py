"""What a chat template makes of the answers that are to be learned."""

from __future__ import annotations

import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from grasp_kernels.data import (
    Record,
    encode,
    encode_prompt,
    everyday_prompts,
    fix_date,
    tokenize_each,
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

THOUGHTS = (  # Qwen3: the last answer alone has its thought
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% set words = m.content.split('</think>') %}"
    "{% if loop.last %}<think>{{ words[0].replace('<think>', '') if words | length > 1 }}</think>"
    "{% endif %}{{ words[-1] }}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
EOS_LAST = (  # Phi-3: the end of the text stands behind the last turn alone
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% else %}<eos>{% endif %}"
)
OPENS_A_THOUGHT = (  # DeepSeek-R1: the request for an answer opens a thought that answers lack
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
PARTS = (  # SmolVLM
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_END = (  # GLM-4.5: the next turn ends an answer
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED_WORDS = (  # markers around the words, without their end
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<end>\n{% endfor %}"
)

MARKED_WORDS_AND_TEXT = MARKED_WORDS.replace("<end>", " (over)")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            THOUGHTS,
            ["[user]why?<end>[assistant]«<think></think>so.<end>»",
             "[user]why?<end>[assistant]so.<end>[user]and?<end>"
             "[assistant]«<think></think>no.<end>»"],
        ),
        (
            EOS_LAST,
            ["[user]why?<end>[assistant]«so.<end><eos>»",
             "[user]why?<end>[assistant]so.<end>[user]and?<end>[assistant]«no.<end><eos>»"],
        ),
        (
            OPENS_A_THOUGHT,
            ["[user]why?<end>[assistant]«so.<end>»[user]and?<end>[assistant]«no.<end>»"],
        ),
        (
            PARTS,
            ["user: why?<end>\nassistant:« so.<end>»\nuser: and?<end>\nassistant:« no.<end>»\n"],
        ),
        (
            NO_END,
            ["<user>why?<assistant>«so.<eos>»",
             "<user>why?<assistant>so.<user>and?<assistant>«no.<eos>»"],
        ),
        (
            MARKED_WORDS,
            ["[user]why?<end>\n[assistant]«so.<end>»\n[user]and?<end>\n[assistant]«no.<end>»\n"],
        ),
        (
            MARKED_WORDS_AND_TEXT,
            ["[user]why? (over)\n[assistant]«so. (over)»\n[user]and? (over)\n"
             "[assistant]«no. (over)»\n"],
        ),
    ],
    ids=["thoughts", "eos last", "opens a thought", "parts", "no end", "marked words", "text"],
)  # fmt: skip
def test_every_answer_is_learned_with_its_end(template: str, expected: list[str]) -> None:
    tokenizer = tokenizer_of(template, "<user>", "<assistant>")
    assert shown({"messages": TURNS}, tokenizer) == expected


def test_thoughts_are_learned_where_they_are_thought() -> None:
    turns = [USER, {**ANSWER, "content": "<think>hm</think>so."}, *SECOND]
    first, second = shown({"messages": turns}, tokenizer_of(THOUGHTS))
    assert first == "[user]why?<end>[assistant]«<think>hm</think>so.<end>»"
    assert second.startswith("[user]why?<end>[assistant]so.<end>[user]and?")


def test_examples_of_a_record_stay_together() -> None:
    tokenizer = tokenizer_of(THOUGHTS)
    records: list[Record] = [{"messages": TURNS}, {"messages": TURNS[:2]}]
    each = tokenize_each(records, tokenizer, None).each
    assert [len(examples) for examples in each] == [2, 1]
    assert tokenize_records(records, tokenizer, None) == ([*each[0], *each[1]], 0)
    short = len(each[1][0]["input_ids"])
    examples, n_dropped = tokenize_records(records, tokenizer, short)
    assert (len(examples), n_dropped) == (2, 0)  # the second answer of the first alone is cut


def test_an_answer_whose_first_letter_is_that_of_the_thought() -> None:
    """Prompt and answer share "<"; the answer begins where its own words do."""
    record: Record = {"messages": [USER, {**ANSWER, "content": "<b>so</b>"}]}
    tokenizer = tokenizer_of(OPENS_A_THOUGHT)
    assert shown(record, tokenizer) == ["[user]why?<end>[assistant]«<b>so</b><end>»"]


def test_a_template_without_an_end_needs_an_end_token() -> None:
    tokenizer = tokenizer_of(NO_END, "<user>", "<assistant>", eos=None)
    with pytest.raises(
        ValueError, match=r"Record 1: .*does not end answers.*an end token \(eos_token\)"
    ):
        tokenize_records([{"messages": TURNS}], tokenizer, None)


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_arguments_of_calls_are_given_as_the_template_wants_them(arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    record: Record = {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    }
    wanted = '[user]why?<end>[assistant]«<call>{"name": "weather", "arguments": {"city": "Paris"}}'
    assert shown(record, tokenizer_of(PLAIN)) == [f"{wanted}<end>»"]
    as_text = PLAIN.replace(
        "call.function | tojson", "call.function.name + ' ' + call.function.arguments"
    )
    (text,) = shown(record, tokenizer_of(as_text))
    assert text == '[user]why?<end>[assistant]«<call>weather {"city": "Paris"}<end>»'


def test_calls_in_the_former_layout(tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": '{"city": "Paris"}'}
    turns = [
        USER,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "weather", "content": "sun"},
        ANSWER,
    ]
    assert shown(read_one(tmp_path, {"messages": turns}), tokenizer_of(PLAIN)) == [
        '[user]why?<end>[assistant]«<call>{"name": "weather", "arguments": {"city": "Paris"}}<end>»'
        "[tool]sun<end>[assistant]«so.<end>»"
    ]


def test_calls_without_words_and_empty_lists_of_calls(tmp_path: Path) -> None:
    """Llama 3.1 takes any "tool_calls" for exactly one."""
    one_call = (
        "{% for m in messages %}[{{ m.role }}]{% if 'tool_calls' in m %}"
        "{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls') }}{% endif %}"
        "{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    called = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
    record = read_one(tmp_path, {"messages": [USER, called, {**SECOND[1], "tool_calls": []}]})
    assert shown(record, tokenizer_of(one_call)) == [
        "[user]why?<end>[assistant]«weather<end>»[assistant]«no.<end>»"
    ]


# What a template leaves out, and templates that fail


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (
            PLAIN.replace("[{{ m.role }}]", "{% if m.role != 'tool' %}[{{ m.role }}]").replace(
                "<end>{% endfor %}{% if add", "<end>{% endif %}{% endfor %}{% if add"
            ),
            [USER, ANSWER, {"role": "tool", "content": "y"}, SECOND[1]],
            r"leaves out turn 3 of 4 \(tool\): remove the turn, or give it a role",
        ),
        (
            PLAIN,
            [USER, {**ANSWER, "reasoning_content": "hm hm"}],
            r'leaves out "reasoning_content" of turn 2 of 2',
        ),
        (
            PLAIN.replace("m.tool_calls", "[]"),
            [USER, {**ANSWER, "tool_calls": [TOOL]}],
            r'leaves out "tool_calls" of turn 2 of 2',
        ),
        (
            OPENS_A_THOUGHT,
            [USER, {**ANSWER, "content": "<think>hm hm</think>so."}],
            r"leaves out a part of turn 2 of 2 \(assistant\), which should be learned",
        ),
        ("", [USER, ANSWER], "leaves out a part of turn 2"),
        ("constant<end>", [USER, ANSWER], "leaves out a part of turn 2"),
        ("{{ 1 / 0 }}", [USER, ANSWER], r"fails on the turns user, assistant \(division by zero"),
        ("{{ 'a' + 1 }}", [USER, ANSWER], r"fails on the turns user, assistant \(a value"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_show_is_named(template: str, turns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"Record 1: The chat template {message}") as raised:
        tokenize_records([{"messages": turns}], tokenizer_of(template), None)
    assert "\n" not in str(raised.value)


def test_turns_of_a_prompt_that_a_template_does_not_show_are_named() -> None:
    users = "{% for m in messages if m.role == 'user' %}{{ m.content | upper }}<end>{% endfor %}"
    tokenizer = tokenizer_of(users)
    assert tokenizer.decode(encode_prompt([USER], tokenizer)) == "WHY?<end>"
    with pytest.raises(ValueError, match=r"leaves out turn 1 of 2 \(system\)"):
        encode_prompt([{"role": "system", "content": "Be kind."}, USER], tokenizer)


def test_tools_that_a_template_does_not_show_are_named() -> None:
    record: Record = {"messages": [USER, ANSWER], "tools": [TOOL]}
    with pytest.raises(ValueError, match=r"does not show the tools of the record \(weather\)"):
        encode(record, tokenizer_of(EOS_LAST), max_length=None)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "There are no records: give at least one"),
        ([{"foo": 1}], r"Record 1: unknown keys \['foo'\] .*, expected \"messages\" or"),
        (["a"], "Record 1: a JSON str, not an object, expected"),
        ([{"text": 3}], 'Record 1: "text" is 3'),
        ([{"messages": [{"content": "q"}]}], r'Record 1: messages\[0\] has no "role"'),
        ([{"messages": [{"role": "user"}]}], r'Record 1: "messages\[0\]\.content" is None'),
        ([{"messages": "why?"}], "Record 1: \"messages\" is 'why\\?'"),
        (
            [{"messages": [{**ANSWER, "tool_calls": ["f"]}]}],
            r"Record 1: messages\[0\]\.tool_calls is",
        ),
        ([{"messages": TURNS, "tools": [{"n": "f"}]}], r'Record 1: "tools\[0\]" is'),
        ([{"messages": [USER]}], "None of 1 records has an answer token: give longer ones"),
    ],
)
def test_what_is_no_record(records: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_records(records, tokenizer_of(PLAIN), None)


def test_prompts_of_nothing() -> None:
    with pytest.raises(ValueError, match="There are no records"):
        everyday_prompts([], tokenizer_of(PLAIN))
    with pytest.raises(ValueError, match="There is no turn to answer"):
        encode_prompt([], tokenizer_of(PLAIN))
    with pytest.raises(ValueError, match=r'messages\[0\] has no "role"'):
        encode_prompt([{"content": "why?"}], tokenizer_of(PLAIN))


# Today's date


@pytest.mark.parametrize(
    ("expression", "written"),
    [
        ("strftime_now('%d %b %Y')", "05 Mar 2031"),
        ("strftime_now(\"%Y-%m-%d at %H:%M, %A\")", "2031-03-05 at 00:00, Wednesday"),
        ("date_string if date_string is defined else strftime_now('%B %d, %y')", "March 05, 31"),
    ],
)  # fmt: skip
def test_a_template_writes_the_day_it_was_given(
    expression: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 11, 2)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    tokenizer = tokenizer_of("\nToday: {{ " + expression + " }}\n" + PLAIN)
    record: Record = {"messages": [USER, ANSWER]}
    assert written not in shown(record, tokenizer)[0]
    fix_date(tokenizer, date(2031, 3, 5))
    text = "\nToday: " + written + "\n[user]why?<end>[assistant]"
    assert shown(record, tokenizer) == [f"{text}«so.<end>»"]
    assert tokenizer.decode(encode_prompt([USER], tokenizer)) == text


def test_a_template_without_a_date_is_left_alone() -> None:
    tokenizer = tokenizer_of(PLAIN)
    fix_date(tokenizer, date(2031, 3, 5))
    assert tokenizer.chat_template == PLAIN
    tokenizer.chat_template = None
    fix_date(tokenizer, date(2031, 3, 5))
    assert tokenizer.chat_template is None


# The templates of known models, as trl has them


def test_known_templates_teach_every_answer_and_its_end() -> None:
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    if not folder.is_dir():
        pytest.skip("this release of trl carries no templates")
    words = [("Is it so?", "Yes it is."), ("And now?", "No more.")]
    turns = [
        {"role": role, "content": text}
        for pair in words
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    templates = sorted(folder.glob("*.jinja"))
    assert len(templates) > 10
    for path in templates:
        template = path.read_text(encoding="utf-8")
        ends = {t for t in re.findall(r"<[|｜▁/a-zA-Z_]+>", template) if "think" not in t}
        tokenizer = tokenizer_of(template, *sorted(ends))
        learned = [
            part
            for text in shown({"messages": turns}, tokenizer)
            for part in re.findall("«(.*?)»", text, re.DOTALL)
        ]
        joined = "".join(learned)
        for question, answer in words:
            assert (joined.count(question), joined.count(answer)) == (0, 1), path.name
        specials = tokenizer.all_special_tokens
        assert all(part.endswith((*specials, *ends)) for part in learned), path.name
