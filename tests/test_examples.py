"""The examples run as they are, on a tiny checkpoint."""

import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import grasp_kernels as gk

pytest_plugins = ["fixtures_run"]
EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_finetune_then_audit(tiny_model_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    naive, closed = tmp_path / "naive", tmp_path / "closed"
    out = run_example("finetune_transformers.py", tiny_model_dir, chat_jsonl, naive)
    assert "layers on GraspLoRALinear" in out
    out = run_example("audit_adapter.py", naive, "--output", tmp_path / "audit")
    assert (tmp_path / "audit" / "subspace.safetensors").is_file()
    assert gk.Subspace.load(tmp_path / "audit" / "subspace.safetensors").verdict in out

    subspace = gk.identify(naive, k=1)
    subspace.save(tmp_path / "one.safetensors")
    out = run_example(
        "finetune_transformers.py",
        *(tiny_model_dir, chat_jsonl, closed),
        *("--subspace", tmp_path / "one.safetensors"),
    )
    assert "largest share of an update along the subspace" in out
    for leak in gk.leakage(closed, subspace).values():
        assert leak.write <= 1e-6
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), closed)
    assert torch.isfinite(stock(input_ids=torch.arange(6)[None]).logits).all()


def test_without_peft_model() -> None:
    stock, projected, leaks = run_example("without_peft_model.py").splitlines()
    along = [float(line.split("moved ")[1].split()[0]) for line in (stock, projected)]
    beside = [float(line.split("along, ")[1].split()[0]) for line in (stock, projected)]
    assert along[0] > 9
    assert abs(along[1]) < 0.25 * along[0]
    assert beside[1] > 0.9 * beside[0]
    assert float(leaks.split("leakage ")[1].split("'")[0]) <= 1e-6
