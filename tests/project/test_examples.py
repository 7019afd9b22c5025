"""The examples run as they are, on a tiny checkpoint."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import grasp_kernels as gk
from tests.helpers.scripts import run_example

pytest_plugins = ("tests.helpers.runs",)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def naive(tiny_model_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock fine-tune, by the example itself."""
    folder = tmp_path_factory.mktemp("examples") / "naive"
    out = run_example("finetune_transformers.py", tiny_model_dir, chat_jsonl, folder)
    assert "layers on GraspLoRALinear" in out
    return folder


def test_audit_finds_a_subspace_and_measures_along_it(naive: Path, tmp_path: Path) -> None:
    out = run_example("audit_adapter.py", naive, "--output", tmp_path)
    subspace = gk.Subspace.load(tmp_path / "subspace.safetensors")
    assert out.startswith(subspace.summary())
    again = run_example("audit_adapter.py", naive, "--subspace", tmp_path / "subspace.safetensors")
    assert again == out
    shares = [float(line.split("%")[0]) for line in out.splitlines() if "lies along" in line]
    assert len(shares) == 6
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_finetune_along_a_subspace(
    trainer: str, naive: Path, tiny_model_dir: Path, chat_jsonl: Path, tmp_path: Path
) -> None:
    pytest.importorskip(trainer)
    subspace = gk.identify(naive, k=1)
    subspace.save(tmp_path / "one.safetensors")
    out = run_example(
        f"finetune_{trainer}.py",
        *(tiny_model_dir, chat_jsonl, tmp_path / "closed"),
        *("--subspace", tmp_path / "one.safetensors"),
    )
    assert re.search(r"with a basis +6\n", out)
    (checkpoint,) = (tmp_path / "closed" / "checkpoints").glob("checkpoint-*")
    for adapter in (tmp_path / "closed", checkpoint):
        for leak in gk.leakage(adapter, subspace).values():
            assert leak <= 1e-6
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    last = [entry for entry in state["log_history"] if "loss" in entry][-1]
    assert last["leakage"] <= 1e-6
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "closed"))
    assert torch.isfinite(stock(input_ids=torch.arange(6)[None]).logits).all()


def test_without_peft_model() -> None:
    stock, projected, leaks = run_example("without_peft_model.py").splitlines()
    along = [float(line.split("moved ")[1].split()[0]) for line in (stock, projected)]
    beside = [float(line.split("along, ")[1].split()[0]) for line in (stock, projected)]
    assert along[0] > 9
    assert abs(along[1]) < 0.25 * along[0]
    assert beside[1] > 0.9 * beside[0]
    assert float(leaks.split("leakage ")[1].split("'")[0]) <= 1e-6
