"""Answers -> judgements, in a file that grows by a line with every reply.

Nothing is lost: a reply is on the disk before the next one is waited for, a call that failed is
noted and made again by the next run, and a line that an interruption has cut is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from answers import read_jsonl
from judge import JudgeFailure
from protocol import METRICS, QUESTIONS, fill

from grasp_kernels.progress import bar

Key = tuple[str, int, str]  # question, sample, metric


def judge_answers(
    judge: Callable[[str], dict[str, Any]],
    prompts: dict[str, str],
    answers: Path,
    judged: Path,
    *,
    workers: int,
    label: str,
) -> int:
    """Judge every answer in the folder `answers` that has no judgement in the file `judged`.

    Returns:
        How many calls failed; they are made again next time.
    """
    done = judgements(judged)
    todo = [
        (key, fill(prompts[key[2]], QUESTIONS[key[0]], row["answer"]))
        for key, row in _wanted(answers)
        if key not in done
    ]
    failed = 0
    judged.parent.mkdir(parents=True, exist_ok=True)
    _cut_incomplete_line(judged)
    with ThreadPoolExecutor(workers) as pool, judged.open("a", encoding="utf-8") as file:
        calls = {pool.submit(judge, prompt): key for key, prompt in todo}
        try:
            for call in bar(as_completed(calls), total=len(calls), desc=label, unit="call"):
                question, sample, metric = calls[call]
                row = {"question": question, "sample": sample, "metric": metric}
                try:
                    row |= call.result()
                except JudgeFailure as error:
                    row["failure"] = str(error)
                    failed += 1
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error: what has not begun
    return failed


def judgements(judged: Path) -> dict[Key, dict[str, Any]]:
    """Replies by question, sample and metric; failures are none."""
    return {
        (row["question"], row["sample"], row["metric"]): row
        for row in read_jsonl(judged)
        if "failure" not in row
    }


def _wanted(answers: Path) -> Iterator[tuple[Key, dict[str, Any]]]:
    for name in QUESTIONS:
        for row in read_jsonl(answers / f"{name}.jsonl"):
            for metric in METRICS:
                yield (name, row["sample"], metric), row


def _cut_incomplete_line(path: Path) -> None:
    if path.exists():
        text = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)
