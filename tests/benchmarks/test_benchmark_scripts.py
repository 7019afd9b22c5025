"""The scripts in benchmarks/, as far as they go without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.helpers.scripts import BENCHMARKS, load_script

pytest_plugins = ("tests.helpers.runs",)


@pytest.mark.slow
def test_identification_is_timed_from_file_to_subspace() -> None:
    found = list(load_script("identification").rows(["tiny"], R=4, rounds=2))
    assert [row["k"] for row in found] == [1]
    assert all(0 < row["p20"] <= row["seconds"] <= row["p80"] for row in found)


def test_calls_are_timed_in_every_way() -> None:
    script = load_script("calls")
    found = list(script.rows(["layer"], rounds=2))
    assert [row["way"] for row in found] == list(script.WAYS)
    assert all(0 < row["p25"] <= row["median"] <= row["p75"] for row in found)
    assert [row["to_peft"] for row in found if row["way"] == "peft"] == [1.0]
    assert "| layer |" in script.report(found)


@pytest.mark.parametrize("name", ["calls", "kept", "linear_kl", "price"])
def test_the_page_shows_the_rows(name: str) -> None:
    script = load_script(name)
    rows = [json.loads(line) for line in script.ROWS.read_text(encoding="utf-8").splitlines()]
    assert name != "calls" or {row["case"] for row in rows} == set(script.PARTS)
    page = BENCHMARKS.parent / "docs" / "performance.md"
    assert script.report(rows) in page.read_text(encoding="utf-8")


def test_kept_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer of ours, in every case; at a toy size the fixed parts weigh more."""
    script = load_script("kept")
    monkeypatch.setattr(script, "MODEL", "tiny")
    found = list(script.rows())
    sizes = [row["bytes"] for row in found]
    assert [row["layers"] for row in found] == ["peft", "grasp"] * 4
    assert all(ours < theirs for theirs, ours in zip(sizes[::2], sizes[1::2], strict=True))
    assert script.report(found).count("\n") == 5


@pytest.mark.slow
def test_the_price_of_one_layer(tiny_model_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    script = load_script("price")
    script.write_layer("tiny", AutoTokenizer.from_pretrained(tiny_model_dir), tmp_path / "layer")
    naive, ours = script.rows(
        "a layer", tmp_path / "layer", str(chat_jsonl), 2, ["naive fine-tune", "run"]
    )
    assert all(row[part] > 0 for row in (naive, ours) for part in ("seconds", "bytes"))
    _, of_naive, of_ours = script.report([naive, ours]).splitlines()[-3:]
    assert of_naive.count("(1.00)") == 2
    assert f"({ours['seconds'] / naive['seconds']:.2f})" in of_ours


def test_the_divergence_is_measured_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("linear_kl")
    monkeypatch.setattr(script, "CASES", {"tiny": (512, 4096, 32)})
    found = list(script.rows("cpu", rounds=1))
    assert [row["way"] for row in found] == list(script.ways("cpu"))
    assert all(row["seconds"] > 0 for row in found)
    plain, fused = (row["bytes"] for row in found)
    assert fused < plain
    hidden, base, weight = torch.randn(5, 8), torch.randn(5, 8), torch.randn(9, 8)
    losses = [loss(hidden, weight, base) for loss in script.ways("cpu").values()]
    torch.testing.assert_close(*losses)


def test_the_ways_of_a_call_give_the_same() -> None:
    """Or a ratio would compare different work."""
    script = load_script("calls")
    gradients = []
    for name in ("peft", "C++", "Python"):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
        model = script.adapted(base, ["0"], [], script.WAYS[name])
        with script.planned_in_python(script.WAYS[name].python):
            model(torch.ones(2, 8)).sum().backward()
        assert name == "peft" or ("Python" in type(model[0]._plan).__name__) == (name == "Python")
        gradients.append(model[0].lora_B["default"].weight.grad)
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0])


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
