"""The cost model against numbers worked out by hand; rows and tables."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import cost, read_rows, table, write_rows
from benchmarks.kernels.__main__ import main
from benchmarks.kernels.cost import Parts, Rates
from benchmarks.kernels.decoder import step_memory
from benchmarks.kernels.shapes import LINEARS, MODELS, Linear

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu.jsonl"
WRITER = Linear("down_proj", 30, 50, True)
READER = WRITER._replace(writes=False)


def test_operations_of_a_linear() -> None:
    # T = 10, K = 30, N = 50: a product is 2 · 10 · 30 · 50, a factor's 2 · 10 · R · 30 or 50
    assert cost.frozen_flops(WRITER, 10) == Parts(30_000, 30_000)
    assert cost.adapter_flops(WRITER, 10, 4) == Parts(2_400 + 4_000, 2 * (2_400 + 4_000))
    assert cost.projection_flops(WRITER, 10, 2) == Parts(0, 1_200 + 2_000)
    assert cost.projection_flops(READER, 10, 2) == Parts(0, 0)
    needed = cost.needed_flops([WRITER, READER], 10, 4, 2, adapts=True, projects=True)
    assert needed == Parts(2 * 36_400, 2 * 42_800 + 3_200)
    frozen = cost.needed_flops([WRITER], 10, 4, 2, adapts=False, projects=False)
    assert frozen == Parts(30_000, 30_000)


def test_bytes_of_a_linear() -> None:
    # bfloat16: the forward reads X once, the backward dY and X once
    assert cost.extra_bytes(WRITER, 10, 2) == Parts(600, 1_600)
    assert cost.extra_bytes(WRITER, 10, 4) == Parts(1_200, 3_200)


def test_the_floor_adds_operations_and_bytes() -> None:
    # 30 000 operations at 10⁶ a second are 30 ms, 600 bytes at 10⁵ a second 6 ms
    rates = Rates(peak_tflops=1e-6, bandwidth_gbs=1e-4)
    floor = cost.floor_ms(Parts(30_000, 30_000), Parts(600, 1_600), rates)
    assert floor.forward == pytest.approx(36)
    assert floor.backward == pytest.approx(46)
    assert floor.as_row()["both"] == pytest.approx(82)


def test_the_floor_of_the_published_cost_model() -> None:
    """4096 → 4096, T = 8192 in bfloat16: 0.20 GB beyond products of 0.55 · 10¹² operations."""
    square = Linear("q_proj", 4096, 4096, False)
    assert sum(cost.extra_bytes(square, 8192, 2)) == pytest.approx(0.2013e9, rel=1e-3)
    assert sum(cost.frozen_flops(square, 8192)) == pytest.approx(0.5498e12, rel=1e-3)


def test_known_shapes() -> None:
    by_name = {linear.name: (linear.K, linear.N) for linear in MODELS["llama-3.1-8b"].linears}
    assert by_name["k_proj"] == (4096, 1024)
    assert by_name["down_proj"] == (14336, 4096)
    assert {linear.N for linear in MODELS["qwen2.5-32b"].linears} == {5120, 1024, 27648}
    assert cost.head_flops(MODELS["tiny"], 10) == Parts(2 * 10 * 256 * 512, 2 * 10 * 256 * 512)
    parameters = 32 * sum(K * N for K, N in by_name.values()) + 2 * 128256 * 4096
    assert parameters == pytest.approx(8.03e9, rel=1e-3)


def test_checkpointing_takes_less_memory_than_saving_every_layer() -> None:
    decoder = MODELS["llama-3.1-8b"]
    small, large = (step_memory(decoder, 32, 8192, 16, 2, saved, 1) for saved in (True, False))
    assert 16e9 < small < large
    assert step_memory(decoder, 32, 16384, 16, 2, False, 1) > 1.5 * large - 16e9


def row(provider: str, linear: str | None = "q_proj", **fields: Any) -> dict[str, Any]:
    """A row with 2 ms of forward and 3 ms of backward unless told otherwise."""
    median = fields.pop("median", 5.0)
    times = {"median": median, "p20": median, "p80": median}
    values = {
        "level": "linear",
        "model": "tiny",
        "linear": linear,
        "K": 256,
        "N": 256,
        "writes": False,
        "layers": None,
        "checkpointing": None,
        "dtype": "bfloat16",
        "T": 16,
        "R": 4,
        "Q": 2,
        "provider": provider,
        "projects": False,
        "backend": None,
        "refused": None,
        "refusal": None,
        "rounds": 3,
        "forward": times,
        "backward": times,
        "both": times,
        "peak_memory": 2**21,
        "floor_ms": {"forward": 0.5, "backward": 1.5, "both": 2.0},
        "flops": {"forward": 1e9, "backward": 9e9, "both": 1e10},
        "extra_bytes": {"forward": 1e6, "backward": 2e6, "both": 3e6},
        "peak_tflops": 1.5,
        "bandwidth_gbs": 10.0,
        "capability": "9.0",
        "driver": "570.01",
        "device": "a GPU",
        "threads": 2,
        "cuda": None,
        "python": "3.11.7",
        "torch": "2.13.0",
        "triton": None,
        "peft": "0.21",
        "grasp_kernels": "0.1.0",
        "commit": "5862705",  # a commit that looks like a number
    }
    return {**values, **fields}


def refused(provider: str, kind: str, reason: str, **fields: Any) -> dict[str, Any]:
    return row(provider, median=None, refused=reason, refusal=kind, peak_memory=None, **fields)


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = [row("peft"), row("frozen", median=1 / 3), refused("grasp", "wrong", 'dx, "odd"')]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert read_rows(path, path) == rows + rows


def test_the_rows_of_the_front_page_give_its_table() -> None:
    text = table(read_rows(STORED))
    assert "| qwen2.5-0.5b | **all** | float32 | 512 | 16 | 4 |  | 193.93 (0.89) | 218.65" in text
    assert "| qwen2.5-0.5b | **all** | bfloat16 | 2048 | 16 | 4 |  | 305.34 (0.81)" in text


def test_a_foreign_file_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"provider": "peft"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is not a benchmark row"):
        read_rows(path)
    short = row("peft")
    del short["rounds"]
    write_rows(path, [row("peft"), short])
    with pytest.raises(ValueError, match=r"line 2 of .* a benchmark row \(it has no 'rounds'\)"):
        read_rows(path)


def test_ratios_and_rates() -> None:
    rows = [row("frozen", median=4.0), row("peft", median=10.0), row("grasp", median=5.0)]
    text = table(rows, details=True)
    # 5 ms: half of peft, 1.25 frozen, 2.5 floors; 10¹⁰ operations; 3 MB in the 1 ms beyond frozen
    assert "| grasp | 5.00 | 5.00 | 5.00 | 0.50 | 1.25 | 2.50 | 2 | 3.0 | 2 |" in text
    assert "| frozen | 4.00 | 4.00 | 4.00 | 0.40 | 1.00 | 2.00 | 2.5 |  | 2 |" in text
    assert "| grasp | 5.00" not in table(rows)  # single linears only with details
    assert "driver 570.01" in text


def test_a_layer_is_summed_only_when_all_seven_were_timed() -> None:
    rows = [row("peft", linear, median=2.0) for linear in LINEARS]
    rows += [row("grasp", linear, median=1.0) for linear in LINEARS[:-1]]
    rows += [row("frozen", linear, median=1.0) for linear in LINEARS[:-1]]
    rows += [refused("frozen", "wrong", "y", linear=LINEARS[-1])]
    total = [line for line in table(rows).splitlines() if "**all**" in line]
    assert total[0].endswith("| 14.00 (1.00) | – | – |")
    assert total[1].endswith("| peft | 14.00 | 14.00 | 14.00 | 1.00 |  | 1.00 | 5 |  | 2 |")
    assert len(total) == 2


def test_refusals_are_told_apart() -> None:
    rows = [
        row("peft"),
        refused("lorafusion", "unavailable", "lorafusion is not installed"),
        refused("grasp", "wrong", "dx 1.0e+00"),
        refused("frozen", "failed", "it raised ValueError: odd"),
    ]
    text = table(rows)
    assert "| 5.00 (1.00) | n/a | wrong | failed |" in text
    assert "- lorafusion unavailable: lorafusion is not installed" in text


def test_machines_are_not_mixed_up() -> None:
    rows = [row("peft", median=2.0), row("grasp", median=1.0, device="another")]
    text = table(rows)
    assert "| 2.00 (1.00) | – |" in text and "| – | 1.00 |" in text
    assert "device a GPU" in text and "device another" in text


def test_a_step_has_a_line_of_its_own() -> None:
    step = {"level": "step", "linear": None, "K": None, "N": None, "layers": 32}
    rows = [row("peft", checkpointing=saved, **step) for saved in (False, True)]
    text = table(rows)
    assert "| tiny | **step, 32 layers** | bfloat16 |" in text
    assert "| tiny | **step, 32 layers, checkpointing** | bfloat16 |" in text


def test_a_report_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "a.jsonl", [row("peft", linear) for linear in LINEARS])
    write_rows(tmp_path / "b.jsonl", [refused("grasp", "wrong", "dx", linear="q_proj")])
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert main(["--report", *files]) == 0
    assert "| tiny | **all** |" in capsys.readouterr().out


def test_rows_alone_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "train.jsonl"
    mine.write_text('{"text": "mine"}\n')
    with pytest.raises(SystemExit):
        main(["--output", str(mine)])
    assert "not a benchmark row" in capsys.readouterr().err
    assert mine.read_text() == '{"text": "mine"}\n'
