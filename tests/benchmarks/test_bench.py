"""The suite measures what it says, and refuses what is wrong; no time is asserted."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import Suite, levels, ours, provider, run_suite, table
from benchmarks.kernels.__main__ import main
from benchmarks.kernels.gate import Gate
from benchmarks.kernels.peft_providers import on_peft
from benchmarks.kernels.provider import Refusal, Weights, make_weights
from benchmarks.kernels.providers import PROVIDERS, at_level, choose
from benchmarks.kernels.shapes import MODELS, Linear

CPU = torch.device("cpu")
TINY = Suite(
    models=("tiny",), tokens=(16,), rounds=2, ranks=(4,), basis=(2,), device="cpu", layers=1
)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kinds(rows: list[dict[str, Any]]) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for row in rows:
        found.setdefault(row["provider"], set()).add(row["refusal"])
    return found


def check_timed(row: dict[str, Any]) -> None:
    for part in ("forward", "backward", "both"):
        assert 0 < row[part]["p20"] <= row[part]["median"] <= row[part]["p80"]
        assert row["floor_ms"][part] > 0
        assert row["flops"][part] > 0
    assert row["torch"] == torch.__version__
    assert row["peak_memory"] is None  # on a CPU


@pytest.mark.slow
def test_every_provider_of_every_linear_has_a_row() -> None:
    rows = list(run_suite(replace(TINY, providers=tuple(PROVIDERS))))
    assert len(rows) == 7 * 2 * len(PROVIDERS)
    for row in rows:
        if row["refusal"] is None:
            check_timed(row)
        else:
            assert row["refusal"] == "unavailable", row["refused"]
            assert row["both"]["median"] is None
    timed = {row["provider"] for row in rows if row["refusal"] is None}
    assert timed == {n for n in PROVIDERS if PROVIDERS[n].unavailable(CPU, torch.bfloat16) is None}
    assert timed >= {"frozen", "peft", "peft-default", "peft-hook", "grasp-aten-projected"}
    assert "ordering-addmm" in timed
    text = table(rows)
    assert "| tiny | down_proj | bfloat16 | 16 | 4 | 2 | 512→256 |" in text
    assert "| tiny | **all** | float32 | 16 | 4 | 2 |" in text
    assert "- peft-default unavailable: in float32 it is the provider 'peft'" in text


@pytest.mark.slow
@pytest.mark.parametrize(("level", "cases"), [("layer", 1), ("step", 2)])
def test_every_provider_of_a_layer_and_of_a_step_has_a_row(level: str, cases: int) -> None:
    names = tuple(at_level(level))
    rows = list(run_suite(replace(TINY, level=level, dtypes=("bfloat16",), providers=names)))
    assert len(rows) == cases * len(names)
    assert {row["checkpointing"] for row in rows} == ({None} if level == "layer" else {False, True})
    for row in rows:
        assert row["refusal"] is None or PROVIDERS[row["provider"]].unavailable(
            CPU, torch.bfloat16
        ), row["refused"]
        if row["refusal"] is None:
            check_timed(row)
            assert row["linear"] is None and row["layers"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("level", ["linear", "layer", "step"])
def test_a_gpu_watches_its_memory(level: str) -> None:
    rows = list(run_suite(replace(TINY, level=level, dtypes=("bfloat16",), device="cuda")))
    assert kinds(rows) == {name: {None} for name in choose((), level)}
    assert all(row["peak_memory"] > 0 for row in rows)
    assert all(0 < row["both"]["p20"] <= row["both"]["p80"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name.startswith("grasp-triton")])
def test_providers_on_kernels_pass_the_gate(name: str) -> None:
    """In the interpreter, which is checked though it is never timed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = make_weights(Linear("o_proj", 64, 48, True), torch.float32, device, 4, 2)
    assert Gate(weights, torch.float32).over_budget(PROVIDERS[name]) == {}
    assert weights.weight.is_contiguous()  # the others of a case hold it too


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> str:
    """A provider that says it projects and does not."""
    forgets = on_peft("no projection at all", lambda module, bases: module, projects=True)
    monkeypatch.setitem(PROVIDERS, "forgetful", forgets)
    return "forgetful"


def test_a_wrong_provider_is_not_timed(forgetful: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(run_suite(replace(TINY, dtypes=("bfloat16",), providers=("peft", forgetful))))
    wrong = {(row["linear"], row["provider"]) for row in rows if row["refusal"] == "wrong"}
    assert wrong == {("o_proj", forgetful), ("down_proj", forgetful)}
    for row in rows:
        if row["refusal"] is not None:
            assert "dx" in row["refused"] and "dlora_B" in row["refused"]
            assert row["both"]["median"] is None
    text = table(rows)
    assert "- forgetful wrong: dx" in text
    total = next(line for line in text.splitlines() if "**all**" in line)
    assert total.endswith("| – |")  # no sum over five linears
    options = "--models tiny --tokens 4 --rounds 2 --dtypes float32 --device cpu --providers"
    assert main([*options.split(), forgetful]) == 1
    assert "wrong" in capsys.readouterr().out


def test_a_missing_projection_of_a_layer_is_seen(forgetful: str) -> None:
    names = ("peft-hook", forgetful)
    rows = list(run_suite(replace(TINY, level="layer", dtypes=("bfloat16",), providers=names)))
    assert kinds(rows) == {"peft-hook": {None}, forgetful: {"wrong"}}


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_the_gate_sees_a_wrong_scaling(scale: float) -> None:
    weights = make_weights(Linear("q_proj", 32, 48, False), torch.bfloat16, "cpu", 4, 0)
    scaled = replace(
        PROVIDERS["ordering-addmm"],
        build=lambda w: PROVIDERS["ordering-addmm"].build(replace(w, scaling=scale * w.scaling)),
    )
    refusal = Gate(weights, torch.bfloat16).refusal(scaled, CPU)
    if scale == 1.0:
        assert refusal is None
    else:
        assert refusal is not None and refusal.kind == "wrong"
        assert {"y", "dx", "dlora_A", "dlora_B"} <= {
            part.split()[0] for part in refusal.reason.split(", ")
        }


def test_what_breaks_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(weights: Weights) -> Any:
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setitem(PROVIDERS, "broken", provider.Provider("it raises", broken))
    rows = list(run_suite(replace(TINY, dtypes=("float32",), providers=("peft", "broken"))))
    assert kinds(rows) == {"peft": {None}, "broken": {"failed"}}
    assert {row["refused"] for row in rows} == {None, "it raised RuntimeError: no such kernel"}
    options = "--models tiny --tokens 4 --rounds 2 --dtypes float32 --device cpu --providers peft"
    assert main(options.split()) == 0
    assert main([*options.split(), "broken"]) == 1
    assert "broken failed: it raised RuntimeError" in capsys.readouterr().out


def test_running_out_of_memory_is_no_mistake() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert PROVIDERS["grasp"].failure(error).kind == "unavailable"
    assert PROVIDERS["grasp"].failure(ValueError("odd")) == Refusal(
        "failed", "it raised ValueError: odd"
    )


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"fast": "it needs a GPU", "slow": None}
    monkeypatch.setattr(ours.registry, "backends", lambda device: reasons)
    assert ours._unavailable("fast", CPU, torch.float32) == "it needs a GPU"
    assert ours._unavailable("slow", CPU, torch.float32) is None
    assert ours._unavailable("auto", CPU, torch.float32) is None


def test_an_interpreter_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: dict[str, str | None] = {"triton": None, "aten": None}
    monkeypatch.setattr(ours.registry, "backends", lambda device: reasons)
    interpreted = "kernels that run in an interpreter on a CPU are not timed"
    assert ours._unavailable("triton", CPU, torch.float32) == interpreted
    assert ours._unavailable("aten", CPU, torch.float32) is None
    reasons["triton"] = "there is no GPU"
    assert ours._unavailable("triton", CPU, torch.float32) == "there is no GPU"


def test_a_dtype_that_a_backend_lacks_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: dict[str, str | None] = {"cuda": None}
    monkeypatch.setattr(ours.registry, "backends", lambda device: reasons)
    gpu = torch.device("cuda")
    assert ours._unavailable("cuda", gpu, torch.float32) == "it does not compute float32"
    assert ours._unavailable("cuda", gpu, torch.bfloat16) is None


def test_every_backend_but_the_specification_is_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours.registry, "BACKENDS", ("new", "aten", "reference"))
    assert set(ours.our_providers()) == {
        *("grasp", "grasp-projected", "grasp-new", "grasp-new-projected"),
        *("grasp-aten", "grasp-aten-projected"),
        *(
            "grasp-frozen-A-projected",
            "grasp-new-frozen-A-projected",
            "grasp-aten-frozen-A-projected",
        ),
    }


def test_nothing_is_projected_without_a_basis() -> None:
    suite = replace(TINY, dtypes=("float32",), basis=(0, 2), providers=("frozen", "peft-hook"))
    rows = list(run_suite(replace(suite, level="layer")))
    assert [(row["Q"], row["provider"], row["refusal"]) for row in rows] == [
        (0, "frozen", None),
        (0, "peft-hook", "unavailable"),
        (2, "frozen", None),
        (2, "peft-hook", None),
    ]


def test_a_step_that_does_not_fit_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(levels, "free_memory", lambda device: 1_000_000)
    for build in ("whole_model", "decoder_layer"):
        monkeypatch.setattr(levels, build, lambda *options: pytest.fail("it was built"))
    suite = replace(TINY, level="step", dtypes=("float32",), providers=("peft",))
    rows = list(run_suite(suite))
    assert {row["refusal"] for row in rows} == {"unavailable"}
    assert "a step of 1 layers with T = 16 takes about" in rows[0]["refused"]
    assert "0.0 GB are free on cpu: fewer --layers or --tokens" in rows[0]["refused"]


def test_all_layers_of_a_case_compute_the_same() -> None:
    weights = make_weights(Linear("q_proj", 5, 6, False), torch.float32, "cpu", 2, 0)
    x = torch.randn(3, 5)
    A, B = weights.lora_A, weights.lora_B
    expected = x @ weights.weight.T + 2.0 * x @ A.T @ B.T
    for name, found in PROVIDERS.items():
        if found.unavailable(CPU, torch.float32):
            continue
        target = x @ weights.weight.T if name == "frozen" else expected
        torch.testing.assert_close(found.build(weights)(x), target)


def test_all_models_of_a_case_share_the_frozen_weights() -> None:
    layer = levels.decoder_layer(MODELS["tiny"], torch.float32, "cpu", 4, 2)
    built = [layer.build(PROVIDERS[name]) for name in ("frozen", "peft", "grasp-projected")]
    frozen = [{p.data_ptr() for p in m.parameters() if not p.requires_grad} for m in built]
    trained = [{p.data_ptr() for p in m.parameters() if p.requires_grad} for m in built]
    assert frozen[0] == frozen[1] == frozen[2]
    assert list(map(len, trained)) == [0, 14, 14]
    assert not trained[1] & trained[2]


def test_providers_are_chosen_by_name_and_by_group() -> None:
    assert choose((), "linear") == tuple(name for name, p in PROVIDERS.items() if p.by_default)
    assert choose(("grasp", "peft"), "step") == ("peft", "grasp")
    assert choose(("all",), "linear") == tuple(PROVIDERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt-9"], "models is 'gpt-9', which is unknown"),
        (["--providers", "magic"], "providers is 'magic', which is unknown"),
        (["--dtypes", "int8"], "dtype is 'int8', which is unknown"),
        (["--level", "city"], "level is 'city', which is unknown"),
        (["--device", "tpu"], "device is 'tpu', which cannot be timed here"),
        (["--level", "layer", "--providers", "ordering-addmm"], "exists for single linears only"),
        (["--tokens", "0"], "tokens is 0; give at least 1"),
        (["--rank", "8", "0"], "ranks is 0; give at least 1"),
        (["--basis", "-1"], "at least 0"),
        (["--level", "step", "--layers", "0"], "layers is 0; give at least 1"),
        (["--report", "missing.jsonl"], "there is no file 'missing.jsonl'"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_rows_of_a_stopped_run_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = iter(range(100))

    def stopped(original: Any, *arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    from benchmarks.kernels import suite

    monkeypatch.setattr(suite, "_measure", partial(stopped, suite._measure))
    out = tmp_path / "rows.jsonl"
    options = f"--models tiny --tokens 4 --rounds 2 --providers peft --device cpu --output {out}"
    assert main(options.split()) == 130
    assert "the rows so far are in the file" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 2


def test_the_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    for name in (*MODELS, *PROVIDERS):
        assert name in text
