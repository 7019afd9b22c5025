"""gpu.sh of the benchmark on a real model: processes side by side, and what they leave."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from benchmarks.quality.smollm2.harness import read_rows

pytest_plugins = ("tests.helpers.smollm2",)
ROOT = Path(__file__).parents[2]
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
