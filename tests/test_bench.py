"""`grasp-kernels bench` times what is right on this machine and names the fastest; no time is
asserted.
"""

from typing import Any

import pytest
import torch

from grasp_kernels import bench
from grasp_kernels.bench import Refusal, Timed, compare, report
from grasp_kernels.cli import main
from grasp_kernels.ops.lora_linear.registry import BACKENDS

NAMES = ["peft", *BACKENDS[:-1], "auto"]
TINY: dict[str, Any] = {"model": "tiny", "tokens": 16, "rank": 4, "seconds": 0.0}


@pytest.mark.parametrize("basis", [0, 2])
def test_every_backend_is_timed_or_says_why_not(basis: int) -> None:
    timed = list(compare(**TINY, device="cpu", dtype="float32", basis=basis))
    assert [(line.K, line.N) for line in timed] == [
        *((256, 256), (256, 128), (256, 128), (256, 256)),
        *((256, 512), (256, 512), (512, 256)),
    ]
    for line in timed:
        assert list(line.found) == NAMES
        for name in ("peft", "aten", "auto"):
            assert isinstance(line.found[name], float) and line.found[name] > 0
        for name in ("cuda", "triton"):
            refusal = line.found[name]
            assert isinstance(refusal, Refusal) and refusal.kind == "unavailable"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_kernels_are_timed_on_a_gpu() -> None:
    for line in compare(**TINY, device="cuda"):
        assert all(isinstance(found, float) for found in line.found.values()), line


def timed(**found: float | Refusal) -> list[Timed]:
    return [Timed(f"{i}_proj", 512, 256, dict(found)) for i in range(7)]


def test_the_fastest_of_the_backends_is_named() -> None:
    text = report(timed(peft=2.0, cuda=1.5, aten=3.0, auto=1.0))
    assert "| 6_proj | 512→256 | 2.00 | 1.50 | 3.00 | 1.00 |" in text
    assert "| **all** |  | 14.00 (1.00) | 10.50 (0.75) | 21.00 (1.50) | 7.00 (0.50) |" in text
    assert text.endswith('Fastest here: backend="cuda".')


def test_what_was_not_timed_has_no_sum_and_says_why() -> None:
    lines = timed(peft=2.0, triton=1.0, aten=3.0, auto=3.0)
    lines[3].found["triton"] = Refusal("wrong", "dx 1.0e+00")
    text = report(lines)
    assert "| 3_proj | 512→256 | 2.00 | wrong | 3.00 | 3.00 |" in text
    assert "| **all** |  | 14.00 (1.00) | – | 21.00 (1.50) |" in text
    assert "- triton wrong: dx 1.0e+00" in text
    assert text.endswith('Fastest here: backend="aten".')


def test_the_command_fails_where_a_backend_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "bench --model tiny --tokens 16 --rank 4 --seconds 0 --dtype float32 --device cpu"
    assert main(options.split()) == 0
    assert 'backend="aten"' in capsys.readouterr().out
    adopt = bench.GraspLoRALinear.adopt

    def without_basis(layer: Any, V: Any, *projection: Any) -> None:
        adopt(layer, None if projection[-1] == "aten" else V, *projection)

    monkeypatch.setattr(bench.GraspLoRALinear, "adopt", without_basis)
    assert main(options.split()) == 1
    said = capsys.readouterr().out
    assert "- aten wrong: dx" in said and "auto wrong" not in said


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "gpt-9", "--model is 'gpt-9', which is unknown"),
        ("--dtype", "int8", "--dtype is 'int8', which is unknown"),
        ("--device", "tpu", "--device is 'tpu', which cannot be timed here"),
        ("--tokens", "0", "--tokens is 0; give at least 1"),
        ("--rank", "0", "--rank is 0; give at least 1"),
        ("--basis", "-1", "--basis is -1; give at least 0"),
    ],
)
def test_bad_input_is_named(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", option, value]) == 2
    assert message in capsys.readouterr().err
