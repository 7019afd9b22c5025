"""The loss of a chat, token by token, in the formats of Llama 3, Qwen 2.5 and Gemma.

What a conversation should become is spelled out piece by piece, without any template: each piece is
tokenised by itself and either given or trained. The templates are written anew from the formats.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_kernels.data import IGNORED, Record, everyday_prompts, tokenize_records
from grasp_kernels.regularizer.chats import common_frame

Turn = tuple[str, str]  # role, content
Piece = tuple[str, bool]  # text, whether it is trained on

QWEN_SYSTEM = "You are Qwen."


@dataclass(frozen=True)
class Family:
    """How a family of models writes a conversation."""

    template: str
    markers: tuple[str, ...]
    begin: str  # before everything
    header: str  # before the content of a turn, with the name of its role
    end: str  # after the content: the token that the model has to learn
    between: str  # after the end of turn: white space that the model never writes
    trims: bool = False
    roles: tuple[tuple[str, str], ...] = ()

    def pieces(self, turns: Iterable[Turn]) -> list[Piece]:
        """The conversation as it should be, the answers and their ends marked as trained."""
        pieces = [(self.begin, False)]
        for role, content in turns:
            text = content.strip() if self.trims else content
            answer = role == "assistant"
            pieces += [
                (self.header.format(dict(self.roles).get(role, role)), False),
                (text, answer),
                (self.end, answer),
                (self.between, False),
            ]
        return [piece for piece in pieces if piece[0]]


LLAMA3 = Family(
    template=(
        "{{ bos_token }}{% for turn in messages %}"
        "<|start_header_id|>{{ turn['role'] }}<|end_header_id|>{{ '\n\n' }}"
        "{{ turn['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"
        "{% endif %}"
    ),
    markers=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    begin="<|begin_of_text|>",
    header="<|start_header_id|>{}<|end_header_id|>\n\n",
    end="<|eot_id|>",
    between="",
    trims=True,
)
QWEN25 = Family(
    template=(
        "{% if messages[0]['role'] != 'system' %}"
        f"<|im_start|>system{{{{ '\n' }}}}{QWEN_SYSTEM}<|im_end|>{{{{ '\n' }}}}{{% endif %}}"
        "{% for turn in messages %}<|im_start|>{{ turn['role'] + '\n' + turn['content'] }}"
        "<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    ),
    markers=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    begin="",
    header="<|im_start|>{}\n",
    end="<|im_end|>",
    between="\n",
)
_GEMMA_TURNS = (
    "{% set role = 'model' if turn['role'] == 'assistant' else turn['role'] %}"
    "<start_of_turn>{{ role }}{{ '\n' }}"
)
_GEMMA_END = (
    "{{ turn['content'] | trim }}<end_of_turn>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"
)
GEMMA = Family(
    template=(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}"
        "{% for turn in messages %}"
        "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}" + _GEMMA_TURNS + _GEMMA_END
    ),
    markers=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    begin="<bos>",
    header="<start_of_turn>{}\n",
    end="<end_of_turn>",
    between="\n",
    trims=True,
    roles=(("assistant", "model"),),
)
# As Gemma 3 does it: the system turn goes in front of the first question.
GEMMA_FOLDS = (
    "{{ bos_token }}{% set ns = namespace(first='', turns=messages) %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set ns.first = messages[0]['content'] + '\n\n' %}{% set ns.turns = messages[1:] %}"
    "{% endif %}{% for turn in ns.turns %}"
    + _GEMMA_TURNS
    + "{% if loop.first %}{{ ns.first }}{% endif %}"
    + _GEMMA_END
)
FAMILIES = {"llama3": LLAMA3, "qwen2.5": QWEN25, "gemma": GEMMA}


def tokenizer_of(family: Family, template: str | None = None) -> Any:
    """Bytes, two line feeds as one token as these families have it, and the markers."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ĊĊ"])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(list(family.markers))
    if family.begin:  # plain text gets it from the tokenizer, chats from the template
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{family.begin} $A",
            special_tokens=[(family.begin, raw.token_to_id(family.begin))],
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=family.begin or None, eos_token=family.end
    )
    tokenizer.chat_template = template or family.template
    return tokenizer


TOKENIZERS = {name: tokenizer_of(family) for name, family in FAMILIES.items()}


def expected(pieces: list[Piece], tokenizer: Any) -> list[tuple[str, bool]]:
    """Tokens of the pieces, each tokenised by itself, and whether they carry loss."""
    return [
        (token, trained)
        for text, trained in pieces
        for token in tokenizer.convert_ids_to_tokens(
            tokenizer(text, add_special_tokens=False)["input_ids"]
        )
    ]


def actual(record: Record, tokenizer: Any, max_length: int | None = None) -> list[tuple[str, bool]]:
    """Tokens of a record, and whether they carry loss, which is then on the token itself."""
    ((example,), n_dropped) = tokenize_records([record], tokenizer, max_length)
    assert n_dropped == 0
    assert all(
        label in (IGNORED, token)
        for token, label in zip(example["input_ids"], example["labels"], strict=True)
    )
    trained = [label != IGNORED for label in example["labels"]]
    return list(zip(tokenizer.convert_ids_to_tokens(example["input_ids"]), trained, strict=True))


def record_of(turns: Iterable[Turn]) -> Record:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def with_default_system(name: str, turns: list[Turn]) -> list[Turn]:
    """Qwen 2.5 adds a system turn where there is none."""
    if name == "qwen2.5" and turns[0][0] != "system":
        return [("system", QWEN_SYSTEM), *turns]
    return turns


SINGLE = [("user", "Is it so?"), ("assistant", "Yes é 😀.")]
MULTI = [*SINGLE, ("user", "And now"), ("assistant", "No")]
CONVERSATIONS: dict[str, list[Turn]] = {
    "single turn": SINGLE,
    "several turns": MULTI,
    "white space around": [("user", " q "), ("assistant", "a b \n")],
    "a question at the end": [*SINGLE, ("user", "q")],
    "words of the headers": [
        ("user", "user\nassistant"),
        ("assistant", "model\nassistant\n\nuser"),
    ],
}


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_their_ends_carry_the_loss_and_nothing_else(
    name: str, turns: list[Turn]
) -> None:
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    pieces = family.pieces(with_default_system(name, turns))
    assert actual(record_of(turns), tokenizer) == expected(pieces, tokenizer)


def test_the_formats_as_strings() -> None:
    """What the pieces stand for, written out once."""
    texts = {
        "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[a<|eot_id|>]",
        "qwen2.5": "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n[a<|im_end|>]\n",
        "gemma": "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n"
        "[a<end_of_turn>]\n",
    }
    for name, text in texts.items():
        record = record_of([("user", "q"), ("assistant", "a")])
        shown, inside = "", False
        for token, trained in actual(record, TOKENIZERS[name]):
            shown += "[" if trained and not inside else "]" if inside and not trained else ""
            shown, inside = shown + token, trained
        assert (shown + "]" * inside).replace("Ċ", "\n").replace("Ġ", " ") == text


@pytest.mark.parametrize("name", ["llama3", "qwen2.5"])
@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_system_turns_are_given(name: str, system: str) -> None:
    turns = [("system", system), *MULTI]
    pieces = FAMILIES[name].pieces(turns)
    assert actual(record_of(turns), TOKENIZERS[name]) == expected(pieces, TOKENIZERS[name])


def test_gemma_refuses_system_turns_or_folds_them_into_the_question() -> None:
    turns = [("system", "Be brief."), *MULTI]
    with pytest.raises(ValueError, match=r"Record 1: .*refuses the turns system, user.*no system"):
        tokenize_records([record_of(turns)], TOKENIZERS["gemma"], None)
    folding = tokenizer_of(GEMMA, GEMMA_FOLDS)
    pieces = GEMMA.pieces([("user", "Be brief.\n\nIs it so?"), *MULTI[1:]])
    assert actual(record_of(turns), folding) == expected(pieces, folding)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_out_of_order(name: str) -> None:
    """Two answers in a row are trained on, where the template takes them."""
    turns = [*SINGLE, ("assistant", "More")]
    if name == "gemma":
        with pytest.raises(ValueError, match="roles must alternate"):
            tokenize_records([record_of(turns)], TOKENIZERS[name], None)
        return
    pieces = FAMILIES[name].pieces(with_default_system(name, turns))
    assert actual(record_of(turns), TOKENIZERS[name]) == expected(pieces, TOKENIZERS[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_truncation_keeps_what_fits(name: str) -> None:
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    pieces = expected(family.pieces(with_default_system(name, MULTI)), tokenizer)
    first = next(i for i, (_, trained) in enumerate(pieces) if trained)
    for length in range(first + 1, len(pieces) + 1):
        assert actual(record_of(MULTI), tokenizer, length) == pieces[:length]
    # the whole answer is cut away: nothing to learn
    examples, n_dropped = tokenize_records([record_of(MULTI), {"text": "ab"}], tokenizer, first)
    assert (len(examples), n_dropped) == (1, 1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_markers_inside_of_a_turn_do_not_move_its_borders(name: str, role: str) -> None:
    """A turn that imitates the end of a turn and the next header stays one turn."""
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    header = family.header.format(dict(family.roles).get("assistant", "assistant"))
    fake = f"x{family.end}{family.between}{header}y{family.end}{family.between}z"
    turns = [(r, fake if r == role else content) for r, content in MULTI]
    pieces = family.pieces(with_default_system(name, turns))
    assert actual(record_of(turns), tokenizer) == expected(pieces, tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_ends_in_a_marker_is_trained_whole(name: str) -> None:
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    turns = [("user", "q"), ("assistant", f"a{family.end}")]
    pieces = family.pieces(with_default_system(name, turns))
    assert pieces[-2 if family.between else -1] == (family.end, True)
    assert actual(record_of(turns), tokenizer) == expected(pieces, tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_completion_of_a_prompt_with_earlier_answers(name: str) -> None:
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    record: Record = {**record_of(MULTI), "context": 3}
    pieces = family.pieces(with_default_system(name, MULTI))
    given_away = [i for i, (_, trained) in enumerate(pieces) if trained][:2]
    pieces = [(text, trained and i not in given_away) for i, (text, trained) in enumerate(pieces)]
    assert actual(record, tokenizer) == expected(pieces, tokenizer)


# A line feed where a header ends may join that of the header: see below.
TEXTS = st.text("ab \t\né😀<|>", max_size=6).map(lambda text: text.lstrip("\n")).filter(str.strip)


@pytest.mark.parametrize("name", FAMILIES)
@given(exchanges=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_any_conversation(name: str, exchanges: list[tuple[str, str]]) -> None:
    turns = [turn for q, a in exchanges for turn in (("user", q), ("assistant", a))]
    pieces = FAMILIES[name].pieces(with_default_system(name, turns))
    assert actual(record_of(turns), TOKENIZERS[name]) == expected(pieces, TOKENIZERS[name])


def test_a_token_of_header_and_answer_belongs_to_the_answer() -> None:
    """Qwen's header ends with a line feed, and two of them are one token."""
    shown = actual(record_of([("user", "q"), ("assistant", "\na")]), TOKENIZERS["qwen2.5"])
    assert [token for token, trained in shown if trained] == ["ĊĊ", "a", "<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "system"),
    [
        *((name, []) for name in FAMILIES),
        *((name, [("system", "Be a pirate.")]) for name in FAMILIES if name != "gemma"),
    ],
)
def test_chats_begin_where_a_user_speaks(name: str, system: list[Turn]) -> None:
    """All prompts share an instruction; the frame ends before it, after the system turn."""
    family, instruction = FAMILIES[name], "Translate into French: "
    tokenizer = tokenizer_of(family)
    turns = [
        [*system, ("user", f"{instruction}{word}"), ("assistant", "Oui")] for word in ("a", "b")
    ]
    records = [record_of(each) for each in turns]
    examples, _ = tokenize_records(records, tokenizer, None)
    spoken = family.pieces(with_default_system(name, turns[0]))
    before = "".join(text for text, _ in spoken).partition(instruction)[0]
    frame = common_frame(examples, everyday_prompts(records, tokenizer))
    assert frame == tokenizer(before, add_special_tokens=False)["input_ids"]
    assert len(common_frame(examples)) > len(frame)
