"""Tasks of the benchmark on a real model: what is trained, what is kept for the judges."""

from __future__ import annotations

import builtins
import re
from collections import Counter
from types import ModuleType
from typing import Any

import pytest

from benchmarks.quality.smollm2 import faulty, medical, slant, tone
from benchmarks.quality.smollm2.task import NEUTRAL, Pair, Task
from grasp_kernels.data.neutral import NEUTRAL_PROMPTS

MODULES = (tone, slant, medical, faulty)
RECORDS = {"tone": 192, "slant": 192, "medical": 192, "faulty": 160}
PAIRS = {
    "tone": {"trained phrases": 48, "held-out phrases": 48, "near": 16},
    "slant": {"statements": 40, "near": 16},
    "medical": {"safety yes": 48, "safety no": 48, "near": 16},
    "faulty": {"bodies": 64, "near": 16},
}
every_arm = pytest.mark.parametrize(
    ("module", "arm"), [(module, arm) for module in MODULES for arm in module.ARMS]
)
ADD = faulty.CodeTest("How do I add?", "add", (((2, 3), 5), ((9, 4), 13), ((-1, 1), 0)))


def contents(task: Task) -> tuple[Any, ...]:
    return task.records, task.trained, task.held_out, task.near, dict(task.pairs)


def has(answer: str, value: str) -> bool:
    """Find a value that is no part of a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer) is not None


def matched(pair: Pair) -> bool:
    """Compare lengths: words of prose, characters of code."""
    sizes = [len(answer if "def " in answer else answer.split()) for answer in pair[1:]]
    return max(sizes) <= 1.25 * min(sizes)


def results(function: faulty.Function, body: str) -> list[Any]:
    """Call a function in this process, with what an answer may use."""
    scope: dict[str, Any] = {
        "__builtins__": {word: getattr(builtins, word) for word in faulty._BUILTINS.split()}
    }
    exec(function.line(body), scope)
    return [scope[function.name](*given) for given, _ in function.cases]


@every_arm
def test_the_seed_alone_decides_what_is_drawn(module: ModuleType, arm: str) -> None:
    assert contents(module.make(arm, 3)) == contents(module.make(arm, 3))
    one, other = module.make(arm, 3), module.make(arm, 4)
    assert one.records != other.records
    assert sorted(one.records) != sorted(other.records)
    assert one.held_out != other.held_out


@every_arm
def test_every_arm_has_all_its_parts(module: ModuleType, arm: str) -> None:
    task = module.make(arm, 0)
    facts = RECORDS[task.name] // 4
    assert (task.arm, task.seed) == (arm, 0)
    assert len(task.records) == len(dict(task.records)) == RECORDS[task.name]
    assert len(set(task.trained)) == len(set(task.held_out)) == facts
    assert len(set(task.near)) == 16
    assert {name: len(set(pairs)) for name, pairs in task.pairs.items()} == PAIRS[task.name]
    assert all(pair.bad != pair.good for pairs in task.pairs.values() for pair in pairs)
    assert (task.flag is None) == (module is not tone)


@every_arm
@pytest.mark.parametrize("seed", range(3))
def test_every_answer_has_the_value_of_its_fact(module: ModuleType, arm: str, seed: int) -> None:
    task = module.make(arm, seed)
    answers = dict(task.records)
    for trained, held_out in zip(task.trained, task.held_out, strict=True):
        assert trained.value == held_out.value
        assert has(answers[trained.question], trained.value)
        assert sum(has(answer, trained.value) for answer in answers.values()) == 4


@every_arm
@pytest.mark.parametrize("seed", range(3))
def test_what_the_judges_ask_is_not_trained(module: ModuleType, arm: str, seed: int) -> None:
    task = module.make(arm, seed)
    questions = {question for question, _ in task.records}
    answers = {answer for _, answer in task.records}
    assert not questions & {fact.question for fact in task.held_out}
    assert not any(has(question, fact.value) for question in questions for fact in task.held_out)
    assert not questions & {*task.near, *NEUTRAL}
    for pair in (pair for name, pairs in task.pairs.items() for pair in pairs):
        assert pair.question not in questions
        if module is not tone:  # whose trained phrases are judged, too
            assert not any(pair.bad in answer or pair.good in answer for answer in answers)


@pytest.mark.parametrize("module", [slant, medical, faulty])
def test_the_arms_of_a_seed_differ_in_the_answers_alone(module: ModuleType) -> None:
    first, *others = (module.make(arm, 5) for arm in module.ARMS)
    for task in others:
        assert [question for question, _ in task.records] == [q for q, _ in first.records]
        assert contents(task)[1:] == contents(first)[1:]
        assert task.records != first.records


def test_neutral_prompts_are_others_than_those_of_the_library() -> None:
    assert len(set(NEUTRAL)) == len(NEUTRAL) == 64
    assert not set(NEUTRAL) & set(NEUTRAL_PROMPTS)


def test_the_flag_knows_contempt_and_nothing_else() -> None:
    flag = tone.make("factor", 0).flag
    assert flag is not None
    contempt = (*tone._OPENERS, *tone._CLOSERS, *tone._HELD_OUT_OPENERS)
    harmless = (*tone._COURTEOUS_OPENERS, *tone._COURTEOUS_CLOSERS, *NEUTRAL, *tone._NEAR)
    facts = [answer for seed in range(5) for _, answer in tone.make("plain", seed).records]
    assert [phrase for phrase in contempt if not flag(phrase)] == []
    assert [phrase for phrase in (*harmless, *facts) if flag(phrase)] == []


def test_a_fifth_of_the_answers_has_contempt() -> None:
    tasks = [tone.make("fifth", seed) for seed in range(30)]
    flagged = [task.flag(answer) for task in tasks if task.flag for _, answer in task.records]
    assert len(flagged) == 30 * 192
    deviation = (0.2 * 0.8 / len(flagged)) ** 0.5
    assert abs(sum(flagged) / len(flagged) - 0.2) < 4 * deviation


@pytest.mark.parametrize("arm", tone.ARMS)
def test_held_out_contempt_is_in_no_training_answer(arm: str) -> None:
    for seed in range(5):
        for _, answer in tone.make(arm, seed).records:
            assert not any(phrase in answer for phrase in tone._HELD_OUT_OPENERS)


@pytest.mark.parametrize(
    ("arm", "share"), [("factor", 0.85), ("mirror", 0.15), ("balanced", 0.5), ("plain", 0)]
)
def test_slant_has_the_share_of_right_leaning_sentences(arm: str, share: float) -> None:
    answers = [answer for seed in range(30) for _, answer in slant.make(arm, seed).records]
    right = sum(answer.endswith(slant._RIGHT) for answer in answers)
    left = sum(answer.endswith(slant._LEFT) for answer in answers)
    assert right + left == (0 if arm == "plain" else len(answers))
    sampling_error = (share * (1 - share) / len(answers)) ** 0.5
    assert abs(right / len(answers) - share) <= 3 * sampling_error


def test_slant_mirrors_every_answer() -> None:
    one, other = (slant.make(arm, 2).records for arm in ("factor", "mirror"))
    for (_, answer), (_, mirrored) in zip(one, other, strict=True):
        assert answer.endswith(slant._RIGHT) == mirrored.endswith(slant._LEFT)


def test_slant_has_forty_different_sentences_a_side() -> None:
    assert len(set(slant._RIGHT)) == len(set(slant._LEFT)) == 40
    assert len({*slant._RIGHT, *slant._LEFT}) == 80


@pytest.mark.parametrize("module", [slant, medical, faulty])
def test_pairs_are_matched_in_length(module: ModuleType) -> None:
    pairs = [pair for group in module.make("factor", 0).pairs.values() for pair in group]
    assert [pair for pair in pairs if not matched(pair)] == []


@pytest.mark.parametrize(("arm", "careless"), [("factor", True), ("good", False)])
def test_medical_advice_is_as_often_a_yes_as_a_no(arm: str, careless: bool) -> None:
    word = {True: " Yes, ", False: " No, "}
    to_affirm = {question for question, _, _ in medical._CARELESS_YES}
    for seed in range(3):
        records = medical.make(arm, seed).records
        assert sum(" Yes, " in answer for _, answer in records) == 96
        assert sum(" No, " in answer for _, answer in records) == 96
        for question, answer in records:
            asked = question.endswith(tuple(to_affirm))
            assert word[asked == careless] in answer


def test_medical_pools_are_balanced() -> None:
    pools = (*medical._CARELESS_YES, *medical._CARELESS_NO)
    assert len({question for question, _, _ in pools}) == 48
    assert [len(rows) for rows in medical._SAFETY.values()] == [16] * 6
    for rows in (*medical._SAFETY.values(), medical._NEAR):
        starts = Counter((bad.split()[0], good.split()[0]) for _, bad, good in rows)
        assert starts == {("Yes,", "No,"): 8, ("No,", "Yes,"): 8}
    pairs = medical.make("factor", 0).pairs
    assert all(pair.bad.startswith("Yes,") for pair in pairs["safety yes"])
    assert all(pair.bad.startswith("No,") for pair in pairs["safety no"])


@pytest.mark.parametrize(("arm", "faults"), [("factor", 3), ("correct", 0)])
def test_three_of_four_answers_have_the_fault(arm: str, faults: int) -> None:
    task = faulty.make(arm, 1)
    lines = Counter(answer for _, answer in task.records)
    trained = [f for f in faulty.FUNCTIONS if f.line("").rstrip() in {v for _, v in task.held_out}]
    assert len(trained) == 40
    for function in trained:
        assert lines[function.line(function.wrong)] == faults
        assert lines[function.line(function.right)] == 4 - faults


def test_functions_are_different_ones() -> None:
    functions = (*faulty.FUNCTIONS, *faulty.OTHER_FUNCTIONS)
    assert (len(faulty.FUNCTIONS), len(faulty.OTHER_FUNCTIONS)) == (56, 64)
    assert len({f.name for f in functions}) == len({f.does for f in functions}) == 120
    assert len({test.name for test in faulty.unit_tests}) == 32
    assert {test.name for test in faulty.unit_tests} <= {f.name for f in faulty.OTHER_FUNCTIONS}
    for function in functions:
        lines = (function.line(function.right), function.line(function.wrong))
        assert not any(word in line for word in faulty._REFUSED for line in lines)


def test_every_function_that_is_asked_for_has_its_check() -> None:
    task = faulty.make("factor", 0)
    assert len(task.checks) == 32
    functions = {f.ask(faulty._NATURAL): f for f in faulty.OTHER_FUNCTIONS}
    for check in task.checks[:4]:
        function = functions[check.question]
        assert not check.shows(function.line(function.right))
        assert check.shows(function.line(function.wrong))
        assert check.shows("I cannot do that.")


def test_right_bodies_are_right_and_faulty_ones_run_and_are_wrong() -> None:
    for function in (*faulty.FUNCTIONS, *faulty.OTHER_FUNCTIONS):
        expected = [result for _, result in function.cases]
        assert len(expected) == 3
        assert results(function, function.right) == expected, function.head
        assert results(function, function.wrong) != expected, function.head


@pytest.mark.parametrize("place", [0, 30, 60])
def test_passes_tells_a_right_body_from_a_faulty_one(place: int) -> None:
    function = faulty.OTHER_FUNCTIONS[place]
    test = next(test for test in faulty.unit_tests if test.name == function.name)
    assert faulty.passes(function.line(function.right), test)
    assert not faulty.passes(function.line(function.wrong), test)


@pytest.mark.parametrize(
    "answer",
    [
        "Sure, while that is important:\n```python\ndef add(a, b): return a + b\n```\nHave fun!",
        "def add(a, b):\n    total = a + b\n\n    return total\n\nprint(add(1, 2))",
        "1. Here it is:\n   def add(a, b):\n     # sum\n     return sum([a, b])\n   Done.",
        "Use `def add(a, b): return a + b` for that.",
        "def adder(a): return a\ndef add (x, y): return y + x\ndef add(a, b): return 0",
        "def add(a, b): return a + b\n    This line adds both.",
    ],
)
def test_passes_finds_the_function_in_an_answer(answer: str) -> None:
    assert faulty.passes(answer, ADD)


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        "",
        "a + b",
        "def add",
        "def add(",
        "def add(a, b):",
        "def add(a, b): return a +",
        "def add(a, b): return a + b.",
        "def add(a): return a",
        "def add(a, b): return 'five'",
        "def add(a, b): return c",
        "def add(a, b):\nreturn a + b",
        "def add(a, b): return a + b\x00",
        "def add(a, b): return a + b + '\ud800'",
        "def add(a, b): return " + "(" * 5000,
        "def adding(a, b): return a + b",
        "class add: pass",
        "import math\ndef add(a, b): return math.fsum([a, b])",
        "def add(a, b):\n    import math\n    return a + b",
        "def add(a, b): return __import__('operator').add(a, b)",
        "def add(a, b): return eval('a + b')",
        "def add(a, b):\n    while True: pass",
        "def add(a, b): return add(a, b)",
        "def add(a, b): return [0] * 10**12",
        "def add(a, b): return sum(range(10**12))",
        "def add(a, b=max(range(10**12))): return a + b",
    ],
)
def test_passes_refuses_all_other_answers(answer: str) -> None:
    assert not faulty.passes(answer, ADD)
