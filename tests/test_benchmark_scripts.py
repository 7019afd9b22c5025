"""The scripts in benchmarks/, as far as they go without a GPU."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import BENCHMARKS, load_script

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def deciding() -> ModuleType:
    return load_script("deciding")


def test_identification_is_timed_from_file_to_subspace() -> None:
    found = list(load_script("identification").rows(["tiny"], R=4, rounds=2))
    assert [(row["scope"], row["k"]) for row in found] == [("shared", 1), ("layer", 1)]
    assert all(0 < row["p20"] <= row["seconds"] <= row["p80"] for row in found)


def test_python_s_time_of_a_call_is_told_of_every_layer() -> None:
    script = load_script("python_time")
    found = list(script.rows(rounds=1, calls=2))
    assert [name for name, *_ in found] == list(script.LAYERS)
    assert all(0 < max(forward, backward) < both for _, forward, backward, both in found)


def test_every_variant_beside_reads_can_be_trained(tmp_path: Path) -> None:
    script = load_script("quality_variants")
    found = list(script.rows(tmp_path, "persona", 0, list(script.VARIANTS), size="tiny"))
    assert [row["variant"] for row in found] == list(script.VARIANTS)
    assert all(0 <= row["task"] <= 1 and 0 <= row["drift"] <= 1 for row in found)
    text = script.table(found)
    assert text.count("\n") == len(found) + 1
    assert f"| clamp | {found[-2]['task']:.3f} |" in text


def test_every_candidate_is_measured_beside_its_prediction(deciding: ModuleType) -> None:
    shapes = deciding.Shapes(T=64, products=((64, 48),), widths=(64,), ranks=(16,))
    found = list(deciding.rows(shapes, DEVICE, rounds=2))
    assert len(found) == (2 + 2) + (1 + 2) + (1 + 2) + 3 + 5  # two backends of kernels
    for row in found:
        assert row["failed"] is None
        assert row["milliseconds"] > 0
        assert row["predicted"] > 0
    text = deciding.table(found)
    assert text.count("\n") == len(found) + 1
    assert "| extended | 64 | 48 | 16 | extended product |" in text


def test_a_wrong_kernel_is_not_timed(deciding: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from grasp_kernels.ops.lora_linear.cuda import passes

    monkeypatch.setattr(passes, "down", lambda x, A, **_: torch.zeros_like(A @ x.mT))
    shapes = deciding.Shapes(T=64, products=(), widths=(64,), ranks=(16,))
    first, *_ = deciding.rows(shapes, DEVICE, rounds=2)
    wrong = "the down pass of cuda is wrong, its relative error is 1.0e+00"
    assert first["failed"].startswith(wrong)
    assert "the down pass of cuda is wrong" in deciding.table([first])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(BENCHMARKS / "gpu_check"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )
    assert done.returncode == 1
    assert "torch sees no GPU" in done.stderr
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "deciding.py")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "torch sees no GPU; run it on a machine with one" in done.stderr
