"""Peak memory and time of the divergence from hidden states, of the plain loss and of ours.

    python -m benchmarks.linear_kl [--rows FILE] [--rounds N]

Loss and gradient of `KL(base ‖ model)` by the hidden states of both, with one head. On a GPU with
Liger-Kernel its divergence stands beside it (its JSD at beta 0 is the same number). Memory is the
peak above what the inputs take. Ways take turns; on a CPU with one thread. Without `--rows` the
rows in `results/linear-kl.jsonl` are written again, those of other machines kept.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.kernels.machine import environment
from benchmarks.kernels.rows import Row, write_rows
from grasp_kernels import fused_linear_kl
from grasp_kernels.pages.markdown import table

ROWS = Path(__file__).parent / "results" / "linear-kl.jsonl"
# n positions, V vocabulary, D residual width
CASES = {"llama-3.1-8b": (1024, 128256, 4096), "smollm2-135m": (256, 49152, 576)}


def plain(hidden: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    """As training scripts compute it."""
    log_q = (hidden @ weight.mT).float().log_softmax(dim=-1)
    with torch.no_grad():
        log_p = (base @ weight.mT).float().log_softmax(dim=-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def liger(hidden: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    """Liger-Kernel's divergence of two distributions, at the end that is KL."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss: Tensor = LigerFusedLinearJSD(jsd_beta=0.0)(hidden, weight, base, weight, None)
    return loss


def ways(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The losses that run on a device, by name."""
    found = {"plain": plain, "fused": fused_linear_kl}
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["liger"] = liger
    return found


def measured(run: Callable[[], object], device: str) -> tuple[float, int]:
    """Seconds, and bytes above those in use."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = _of_process("VmRSS"), time.process_time()
    run()
    return time.process_time() - start, _of_process("VmHWM") - before


def _of_process(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def _step(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, base: Tensor) -> None:
    loss(hidden.detach().requires_grad_(), weight, base).backward()


def rows(device: str, rounds: int) -> Iterator[Row]:
    """One row a case and way."""
    machine = environment(torch.device(device))
    for case, (n, V, D) in CASES.items():
        generator = torch.Generator().manual_seed(0)
        hidden, base, weight = (
            torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
            for shape in ((n, D), (n, D), (V, D))
        )
        weight *= D**-0.5
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways(device)}
        for turn in range(rounds + 1):
            for name, loss in ways(device).items():
                one = measured(partial(_step, loss, hidden, weight, base), device)
                found[name] += [one] if turn else []  # the first one is warm-up
        for name, values in found.items():
            seconds = sorted(value[0] for value in values)
            yield {
                "case": case, "n": n, "V": V, "D": D, "way": name, "seconds": median(seconds),
                "spread": seconds[-1] - seconds[0], "bytes": max(value[1] for value in values),
                "rounds": rounds, **machine,
            }  # fmt: skip


def report(found: list[Row]) -> str:
    """A table of MiB and milliseconds, with their ratios to the plain loss."""
    lines = []
    for row in found:
        plain = next(
            r
            for r in found
            if r["way"] == "plain" and all(r[k] == row[k] for k in ("case", "device"))
        )
        lines.append(
            [
                f"{row['case']}, n = {row['n']}, V = {row['V']}, D = {row['D']}",
                row["way"],
                f"{row['bytes'] / 2**20:.0f} ({row['bytes'] / plain['bytes']:.2f})",
                f"{1e3 * row['seconds']:.0f} ({row['seconds'] / plain['seconds']:.2f})",
            ]
        )
    return table(["", "loss", "peak, MiB", "time, ms"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    found = list(rows(device, options.rounds))
    lines = options.rows.read_text().splitlines() if options.rows.exists() else []
    others = [json.loads(line) for line in lines]
    kept = [row for row in others if row["device"] != found[0]["device"]]
    write_rows(options.rows, kept + found)
    print(report(kept + found))


if __name__ == "__main__":
    main()
