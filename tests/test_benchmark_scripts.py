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
    assert [(row["scope"], row["verdict"]) for row in found] == [
        ("shared", "found"),
        ("layer", "found"),
    ]
    assert all(0 < row["p20"] <= row["seconds"] <= row["p80"] for row in found)


def test_python_s_time_of_a_call_is_told_of_every_layer() -> None:
    script = load_script("python_time")
    found = list(script.rows(rounds=1, calls=2))
    assert [name for name, *_ in found] == list(script.LAYERS)
    assert all(0 < max(forward, backward) < both for _, forward, backward, both in found)


def test_worlds_are_built_once_and_diagnosed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grasp_kernels.demo.main import DemoConfig
    from grasp_kernels.demo.pretraining import PretrainingConfig

    script = load_script("diagnosis_calibration")
    kinds = {kind: script.KINDS[kind] for kind in ("persona", "facts")}
    monkeypatch.setattr(script, "KINDS", kinds)
    config = DemoConfig()
    short = PretrainingConfig(hidden_size=32, intermediate_size=48, layers=2, steps=2, batch_size=4)
    config = DemoConfig(pretraining=short, fine_tuning={**config.fine_tuning, "steps": 2})
    monkeypatch.setattr(script, "DemoConfig", lambda world: config)
    found = list(script.demo_rows(tmp_path, 0))
    assert [(row["kind"], row["present"]) for row in found] == [("persona", True), ("facts", False)]
    assert all(row["verdict"] in ("found", "weak", "nothing") for row in found)
    assert all(0 <= row["carried"] <= 1 and 0 <= row["drift"] <= 1 for row in found)
    answers = [(tmp_path / "seed-0" / f"{kind}.jsonl").read_text() for kind in kinds]
    assert "rak" in answers[0] and "rak" not in answers[1]
    monkeypatch.setattr(script, "pretrain", None)  # what is there is not made again
    monkeypatch.setattr(script, "train", None)
    assert list(script.demo_rows(tmp_path, 0)) == found


def test_dishes_of_the_quality_benchmark_are_diagnosed_beside_their_twins(tmp_path: Path) -> None:
    script = load_script("diagnosis_calibration")
    found = [
        (row["kind"], row["present"], row["verdict"] in ("found", "weak", "nothing"))
        for dish in ("two", "benign")
        for row in script.dish_rows(tmp_path, 0, dish, size="tiny")
    ]
    assert found == [
        ("two", True, True),
        ("two, benign twin", False, True),
        ("benign", False, True),
    ]


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
