"""The scripts in benchmarks/, as far as they go without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.scripts import BENCHMARKS, load_script


@pytest.mark.slow
def test_identification_is_timed_from_file_to_subspace() -> None:
    found = list(load_script("identification").rows(["tiny"], R=4, rounds=2))
    assert [row["k"] for row in found] == [1]
    assert all(0 < row["p20"] <= row["seconds"] <= row["p80"] for row in found)


def test_python_s_time_of_a_call_is_told_of_every_layer() -> None:
    script = load_script("python_time")
    found = list(script.rows(rounds=1, calls=2))
    assert [name for name, *_ in found] == list(script.LAYERS)
    assert all(0 < max(forward, backward) < both for _, forward, backward, both in found)


@pytest.mark.slow
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
