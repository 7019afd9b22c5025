"""The benchmark measures what it says, and refuses what is wrong; no time is asserted."""

import json
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from grasp_kernels.bench import Suite, providers, read_rows, run_suite, table, write_rows
from grasp_kernels.bench.providers import PROVIDERS, Provider, Weights
from grasp_kernels.cli import main
from grasp_kernels.ops.lora_linear import aten
from grasp_kernels.testing import Case, differentiate, make_inputs

TINY = Suite(models=("tiny",), tokens=(16,), rounds=2, rank=4, basis=2)


def test_every_provider_of_every_case_has_a_row(tmp_path: Path) -> None:
    rows = list(run_suite(TINY))
    assert len(rows) == 7 * 2 * len(PROVIDERS)
    for row in rows:
        assert row["refused"] is None
        assert 0 < row["both"]["p20"] <= row["both"]["median"] <= row["both"]["p80"]
        assert row["torch"] == torch.__version__
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == json.loads(json.dumps(rows))
    text = table(rows)
    assert "| tiny | down_proj | bfloat16 | 16 | 512→256 |" in text
    assert text.count("**all**") == 2


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = aten.write_weight
    monkeypatch.setattr(aten, "write_weight", lambda W, V: 0 * original(W, V))
    monkeypatch.setattr(providers.GraspLoRALinear, "_cached_write_weight", lambda self: None)
    rows = list(run_suite(TINY))
    wrong = {(row["linear"], row["provider"]) for row in rows if row["refused"] is not None}
    assert wrong == {("o_proj", "grasp-projected"), ("down_proj", "grasp-projected")}
    for row in rows:
        if row["refused"] is not None:
            assert "dx" in row["refused"]
            assert row["both"]["median"] is None
    assert "wrong" in table(rows)


def test_all_layers_of_a_case_hold_the_same_weights() -> None:
    g = torch.Generator().manual_seed(0)
    weights = Weights(
        torch.randn(6, 5, generator=g),
        torch.randn(2, 5, generator=g),
        torch.randn(6, 2, generator=g),
        2.0,
        None,
        None,
    )
    x = torch.randn(3, 5, generator=g)
    expected = x @ weights.weight.T + 2.0 * x @ weights.lora_A.T @ weights.lora_B.T
    for name, provider in PROVIDERS.items():
        assert isinstance(provider, Provider)
        y = provider.build(weights)(x)
        target = x @ weights.weight.T if name == "frozen" else expected
        torch.testing.assert_close(y, target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt-9"], "model 'gpt-9' is unknown"),
        (["--providers", "magic"], "provider 'magic' is unknown"),
        (["--dtypes", "int8"], "dtype 'int8' is unknown"),
        (["--tokens", "0"], "must be at least 1"),
        (["--report", "missing.jsonl"], "there is no file 'missing.jsonl'"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_foreign_file_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"provider": "peft"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is not a benchmark row"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_small_operator(benchmark: BenchmarkFixture, backend: str) -> None:
    """`pytest tests/test_bench.py --benchmark-only` shows the cost of one small call."""
    case = Case(T=64, K=64, N=64, R=8, Q=2)
    inputs = make_inputs(case)
    found = benchmark.pedantic(
        differentiate, args=(case, inputs), kwargs={"backend": backend}, rounds=20, warmup_rounds=2
    )
    assert found["y"].shape == (64, 64)
