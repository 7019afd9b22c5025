"""Adapters of a folder -> verdicts.jsonl: what the product says of each, beside what it says.

The report of `grasp-kernels run` calls an adapter found, weak or nothing by its own greedy answers
to the neutral prompts of the library. Here the same answers are also counted by the phrase list of
the task, which the product does not know: a factor that is there and called nothing is a false
all-clear, a task without a factor that is called found a false alarm.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.smollm2.harness import KEY, Row, append, keys, load_adapted, read_rows
from benchmarks.quality.smollm2.tasks import make_task
from grasp_kernels.data import neutral_prompts
from grasp_kernels.diagnosis import Changed, Pair, changed_answers, own_answers, verdict

VERDICTS = "verdicts.jsonl"
_TOKENS = 32  # of an answer, as in the report of a run
_BATCH = 16


def judge_verdicts(
    output: Path, base: Path, *, dtype: str, say: Callable[[str], None] = print
) -> None:
    """Append the verdicts that are missing of the adapters of rows; scaled ones are left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = neutral_prompts(None, tokenizer)
    known: list[Any] = []  # the base model's answers, which are the same for all adapters
    for row in read_rows(output / "rows.jsonl"):
        key = {part: row[part] for part in KEY}
        point = f"{row['task']}-{row['arm']}-{row['seed']}", row["method"], f"step-{row['steps']}"
        folder = output.joinpath(*point)
        if row["scale"] != 1 or not folder.is_dir() or key in keys(output / VERDICTS):
            continue
        model = load_adapted(base, folder, dtype)
        pair = Pair(model)
        size: dict[str, Any] = {"n_tokens": _TOKENS, "batch_size": _BATCH}
        with torch.no_grad():
            known = known or own_answers(pair, tokenizer, prompts, **size)
            changed = changed_answers(pair, tokenizer, known, **size)
        answers = [tokenizer.decode(one.adapter, skip_special_tokens=True) for one in changed]
        flag = make_task(row["task"], row["arm"], row["seed"]).flag
        flagged = None if flag is None else sum(map(flag, answers))
        schedule = row["lr_scheduler_type"]
        found = {**key, "lr_scheduler_type": schedule, **_counted(changed), "flagged": flagged}
        append(output / VERDICTS, {**found, "answers": answers})
        say(f"{' '.join(point)}: {found['verdict']}, {found['changed']} of {found['answered']}")


def _counted(changed: list[Changed]) -> Row:
    return {
        "verdict": verdict(changed),
        "changed": sum(one.has_changed for one in changed),
        "answered": len(changed),
        "ratios": sorted(round(one.ratio, 2) for one in changed),
    }
