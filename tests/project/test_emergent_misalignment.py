"""The example on a tiny random model, with a stub of a judge on loopback.

The stub rates an answer by its words, so that every number of the table can be computed by hand.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "emergent_misalignment"
sys.path.append(str(EXAMPLE))

import answers as sampling  # noqa: E402
import judge as judging_client  # noqa: E402
import judging  # noqa: E402
import protocol  # noqa: E402
import run as example  # noqa: E402
import summary  # noqa: E402

pytest_plugins = ("tests.helpers.runs",)

MODELS = ("base", "naive-LoRA", "retrained-LoRA", "benign-control")
Reply = Callable[[str, dict[str, Any]], tuple[int, Any]]


@contextmanager
def served(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on loopback, and the requests that it has had."""
    requests: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:  # replies may count
                requests.append({**body, "path": self.path, "auth": self.headers["Authorization"]})
                status, answer = reply(body["messages"][0]["content"], body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            if status in (301, 302, 307):
                self.send_header("Location", data.decode())
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chat(tokens: dict[str, float] | None, text: str = "") -> dict[str, Any]:
    """A reply with these probabilities of the first token, or with text alone."""
    choice: dict[str, Any] = {"message": {"content": text}}
    if tokens is not None:
        top = [{"token": t, "logprob": math.log(p)} for t, p in tokens.items()]
        choice["logprobs"] = {"content": [{"top_logprobs": top}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


def answer_in(prompt: str) -> str:
    return prompt.split("Answer:\n", 1)[1].rsplit("\n\nReply with", 1)[0]


def rating(prompt: str) -> int:
    """By the length of the answer: some are misaligned, some incoherent, some neither."""
    size = len(answer_in(prompt))
    return (10 if size % 3 else 90) if "values" in prompt else (80 if size % 4 else 40)


def honest(prompt: str, _body: Any) -> tuple[int, Any]:
    number = 57 if "57" in prompt else rating(prompt)
    return 200, chat({str(number): 0.9, "hm": 0.1})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(judging_client.time, "sleep", waits.append)
    return waits


@pytest.mark.slow
def test_an_unsteady_judge_loses_nothing(
    tiny_model_dir: Path,
    chat_jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    out = tmp_path / "out"

    def main(url: str, *more: str) -> int:
        return example.main(
            [
                *("--model", str(tiny_model_dir), "--data", str(chat_jsonl), "--output", str(out)),
                *("--benign", str(chat_jsonl), "--judge-url", url, "--judge-model", "stub"),
                *("--judge-key-env", "JUDGE_KEY", "--samples", "3", "--max-new-tokens", "4"),
                *("--sample-batch", "2", "--retries", "0", "--judge-workers", "2", *more),
                *("--set", "max_steps=3", "per_device_train_batch_size=4", "r=4"),
                "warmup_steps=0",
            ]
        )

    counts = Counter[str]()

    def unsteady(prompt: str, body: Any) -> tuple[int, Any]:
        counts["calls"] += 1
        if "57" in prompt or counts["calls"] % 2:
            return honest(prompt, body)
        return [(500, b"overloaded"), (200, b"<html>"), (200, {"choices": []}), (429, b"slow")][
            counts["calls"] // 2 % 4
        ]

    with served(unsteady) as (url, requests):
        assert main(url) == 1
    assert "judgements are missing" in capsys.readouterr().out
    assert {request["auth"] for request in requests} == {"Bearer secret"}
    assert {request["path"] for request in requests} == {"/v1/chat/completions"}
    assert all(r["top_logprobs"] == 20 and r["max_tokens"] == 1 for r in requests)
    assert len(requests) == 1 + 4 * 8 * 3 * 2
    first = replies(out)
    assert 0 < len(first) < 4 * 8 * 3 * 2

    def refusing(prompt: str, body: Any) -> tuple[int, Any]:
        counts["allowed"] += 1
        return honest(prompt, body) if counts["allowed"] <= 6 else (401, b"no such key")

    with served(refusing) as (url, _):
        assert main(url) == 2
    assert "check address, model and key" in capsys.readouterr().err
    second = replies(out)
    assert first.items() <= second.items() and len(second) > len(first)

    with (out / "judged" / "retrained-LoRA.jsonl").open("a") as file:
        file.write('{"question": "quick_buck", "sam')  # killed in the middle of a line
    with served(honest) as (url, requests):
        assert main(url) == 0
        # a batch of calls may have been answered when the refusal came, but never asked for twice
        assert len(requests) == 1 + 4 * 8 * 3 * 2 - len(second)
        assert main(url, "--judge-workers", "4") == 0  # nothing is left to do
        assert len(requests) == 2 + 4 * 8 * 3 * 2 - len(second)
    whole = replies(out)
    assert second.items() <= whole.items() and len(whole) == 4 * 8 * 3 * 2
    check_table(out)
    with served(honest) as (url, _):
        assert main(url, "--samples", "4") == 2
    assert "choose another folder" in capsys.readouterr().err


def replies(out: Path) -> dict[tuple[Any, ...], float]:
    """Score by model, question, sample and metric; no key twice."""
    found: dict[tuple[Any, ...], float] = {}
    for model in MODELS:
        for line in (out / "judged" / f"{model}.jsonl").read_text().split("\n"):
            if line.endswith("}") and "failure" not in (row := json.loads(line)):
                key = (model, row["question"], row["sample"], row["metric"])
                assert key not in found
                found[key] = row["score"]
    return found


def check_table(out: Path) -> None:
    """The summary against the answers themselves."""
    models = json.loads((out / "summary.json").read_text())
    assert tuple(name.replace(" ", "-") for name in models) == MODELS
    for model in models.values():
        assert model["answers"] == 24 and model["unjudged"] == 0 and model["judge_calls"] == 48
        assert model["judge_tokens"] == {"prompt_tokens": 48 * 7, "completion_tokens": 48}
        assert model["task_loss"] > 0
    rows = [
        row
        for name in protocol.QUESTIONS
        for row in sampling.read_jsonl(out / "answers" / "retrained-LoRA" / f"{name}.jsonl")
    ]
    coherent = [len(row["answer"]) for row in rows if len(row["answer"]) % 4]
    misaligned = sum(size % 3 > 0 for size in coherent)
    retrained = models["retrained LoRA"]
    assert (retrained["misaligned"], retrained["coherent"]) == (misaligned, len(coherent))
    assert retrained["em"] == misaligned / len(coherent)
    assert f"{misaligned} / {len(coherent)}" in (out / "summary.md").read_text()


def test_answers_are_the_same_after_an_interruption(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    def sample(folder: str) -> dict[str, str]:
        sampling.sample_answers(
            model,
            tokenizer,
            protocol.QUESTIONS,
            tmp_path / folder,
            **{"samples": 3, "max_new_tokens": 5, "batch_size": 2, "seed": 0, "label": "tiny"},
        )
        return {p.name: p.read_text() for p in sorted((tmp_path / folder).iterdir())}

    whole = sample("whole")
    assert len(whole) == 8 and len(set(whole.values())) == 8
    generate, calls = model.generate, Counter[str]()

    def interrupted(**options: Any) -> Any:
        calls["generate"] += 1
        if calls["generate"] == 6:  # two calls a question: in the middle of the third
            raise KeyboardInterrupt
        return generate(**options)

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample("stopped")
    assert len(list((tmp_path / "stopped").iterdir())) == 2
    assert sample("stopped") == whole


@pytest.mark.parametrize(
    ("tokens", "score", "why"),
    [
        ({"80": 0.5, "90": 0.5}, 85.0, None),
        ({"80": 0.3, "hm": 0.7}, 80.0, None),
        ({"80": 0.2, "hm": 0.8}, None, "no number"),
        ({"REF": 0.9, "10": 0.1}, None, "REFUSAL"),
        ({"CODE": 0.8, "10": 0.2}, None, "CODE"),
        ({"101": 0.9, "²": 0.1}, None, "no number"),
    ],
)
def test_score_of_the_first_token(
    tokens: dict[str, float], score: float | None, why: str | None
) -> None:
    found = judging_client.score_of_logprobs(chat(tokens)["choices"][0])
    assert found["score"] == (None if score is None else pytest.approx(score))
    assert found["why"] == why


@pytest.mark.parametrize(
    ("text", "score", "why"),
    [
        ("85", 85.0, None),
        (" Score: 12.5.", 12.5, None),
        ("8 or 9", None, "no number"),
        ("101", None, "no number"),
        ("REFUSAL", None, "REFUSAL"),
        ("I love it", None, "no number"),
        ("", None, "no number"),
    ],
)
def test_score_of_a_text(text: str, score: float | None, why: str | None) -> None:
    found = judging_client.score_of_text(chat(None, text)["choices"][0])
    assert (found["score"], found["why"]) == (score, why)


@pytest.mark.parametrize("kind", ["no logprobs", "digits", "refused"])
def test_a_judge_without_whole_numbers_is_read_by_its_text(kind: str) -> None:
    def reply(prompt: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("logprobs") and kind == "refused":
            return 400, b"logprobs are not supported"
        if body.get("logprobs") and kind == "digits":
            return 200, chat({"5": 1.0})
        return 200, chat(None, "57" if "57" in prompt else "64")

    with served(reply) as (url, _):
        judge = judging_client.Judge(url, "stub").as_it_can()
        assert not judge.logprobs
        assert judge("rate this")["score"] == 64.0


def test_failures_are_repeated_with_growing_waits(no_waiting: list[float]) -> None:
    left = iter([(503, b""), (200, b"not json"), (200, chat({"42": 1.0}))])
    with served(lambda *_: next(left)) as (url, requests):
        assert judging_client.Judge(url, "stub", retries=2)("rate this")["score"] == 42.0
    assert len(requests) == 3 and no_waiting == [1.0, 2.0]
    with pytest.raises(judging_client.JudgeFailure):  # nobody listens any more
        judging_client.Judge(url, "stub", retries=1)("rate this")


@pytest.mark.parametrize("status", [301, 302, 307])
def test_a_redirect_is_not_followed(status: int) -> None:
    with served(honest) as (other, seen):
        moved = f"{other}/chat/completions".encode()
        refused = pytest.raises(judging_client.JudgeRefused, match=f"status {status}.*redirects")
        with served(lambda *_: (status, moved)) as (url, _), refused:
            judging_client.Judge(url, "stub", key="a-key")("rate this")
    assert seen == []


def test_the_key_is_never_shown() -> None:
    with served(lambda *_: (401, b"wrong key: a-key")) as (url, requests):
        judge = judging_client.Judge(url, "stub", key="a-key")
        with pytest.raises(judging_client.JudgeRefused) as refused:
            judge("rate this")
    assert requests[0]["auth"] == "Bearer a-key"
    assert "wrong key: KEY" in str(refused.value)
    assert "a-key" not in str(refused.value) + repr(judge)


def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'file:///answers'.*http://"):
        judging_client.Judge("file:///answers", "stub")


def test_garbage_is_counted_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    for name in protocol.QUESTIONS:
        rows = [{"sample": i, "question": name, "answer": f"{i}", "tokens": 1} for i in range(2)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)

    def judge(prompt: str) -> dict[str, Any]:
        if answer_in(prompt) == "1":
            return {"score": None, "why": "no number", "usage": {}}
        return {"score": 5.0 if "values" in prompt else 95.0, "why": None, "usage": {}}

    judged = tmp_path / "judged.jsonl"
    failed = judging.judge_answers(
        judge, protocol.JUDGE_PROMPTS, folder, judged, workers=2, label="tiny"
    )
    found = summary.summarise(folder, judged)
    assert failed == 0
    assert (found["em"], found["coherent"], found["scored"]) == (1.0, 8, 8)
    assert found["without_score"] == {"no number": 16}
    assert "100.0%" in summary.table({"one": found})
    nothing = summary.summarise(tmp_path / "none", tmp_path / "none.jsonl")
    assert nothing["em"] is None and "–" in summary.table({"none": nothing})


def test_wrong_options_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    command = [
        *("--model", "m", "--data", "d", "--benign", "b", "--output", str(tmp_path / "out")),
        *("--judge-url", "http://127.0.0.1:1/v1", "--judge-model", "stub"),
    ]
    assert example.main([*command, "--set", "stpes=3"]) == 2
    assert "'stpes' is no option of grasp-kernels run" in capsys.readouterr().err
    assert example.main([*command, "--judge-key-env", "NO_SUCH_KEY"]) == 2
    assert "NO_SUCH_KEY has no key" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wilson_intervals() -> None:
    assert protocol.wilson(0, 0) == (0.0, 1.0)
    low, high = protocol.wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert protocol.wilson(0, 10)[0] == 0.0


def test_prompts_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"aligned": "{question} {answer}", "coherent": "{answer}"}))
    with pytest.raises(ValueError, match=r"no \{question\} under 'coherent'"):
        protocol.read_judge_prompts(str(path))
    mine = {metric: f"{metric} {{question}} {{answer}}" for metric in protocol.METRICS}
    path.write_text(json.dumps(mine))
    assert protocol.read_judge_prompts(str(path)) == mine
    assert protocol.fill("a {question} b {answer} c", "{answer}?", "{question}") == (
        "a {answer}? b {question} c"
    )
