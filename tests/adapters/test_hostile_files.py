"""Files of somebody else: they stay in their folder, cost no time, and their content is only text.

Every refusal is one sentence that names the file or the value.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import grasp_kernels as gk
from grasp_kernels.adapters import load_adapter
from grasp_kernels.cli import main
from grasp_kernels.diagnosis.diagnose import diagnosis_text
from grasp_kernels.diagnosis.pair import open_pair
from grasp_kernels.inert import inert, printable
from grasp_kernels.models.weights import model_weights
from grasp_kernels.pages.markdown import answers_table, cell
from tests.helpers.models import tiny_model, tiny_peft_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FOREIGN = "{0.x} \x1b[2J\n# Verdict: clean\n<img src=x> ![t](http://h/x.png) | `a` **b** \u202e"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = tiny_peft_model(("q_proj", "o_proj", "down_proj"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(call: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and (";" in message or ": " in message)
    return message


def sharded(folder: Path, name: str, shard: str) -> None:
    """Put all tensors of a folder into one shard."""
    tensors = load_file(folder / name)
    (folder / name).unlink()
    target = folder / shard
    target.parent.mkdir(exist_ok=True)
    save_file(tensors, target, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    (folder / f"{name}.index.json").write_text(json.dumps(index))


# --- files stay in their folder


@pytest.mark.parametrize(
    "shard", ["../other/x.safetensors", "{}/other/x.safetensors", "in/x.safetensors", ".."]
)
def test_shards_lie_beside_their_index(
    shard: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    shard = shard.format(tmp_path)
    (tmp_path / "other").mkdir()
    if shard == "..":
        for folder, name in ((adapter, WEIGHTS), (base, "model.safetensors")):
            (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": {"a": ".."}}))
        (adapter / WEIGHTS).unlink()
    else:
        sharded(adapter, WEIGHTS, shard)
        sharded(base, "model.safetensors", shard)
    for call in (load_adapter, gk.identify):
        assert "which are not files in its folder" in refused(lambda call=call: call(adapter))
    assert "which are not files in its folder" in refused(lambda: model_weights(base))


def test_links_do_not_lead_out_of_the_folder(adapter: Path, base: Path, tmp_path: Path) -> None:
    subspace = gk.identify(adapter, k=1)
    (tmp_path / "elsewhere.json").write_text('{"mine": 1}')
    (adapter / "notes.json").symlink_to(tmp_path / "elsewhere.json")
    out = tmp_path / "out"
    said = refused(lambda: gk.project_adapter(adapter, subspace, out))
    assert "notes.json" in said and "outside of its folder" in said and not out.exists()
    (adapter / "notes.json").unlink()
    for folder, name, call in (
        (adapter, WEIGHTS, load_adapter),
        (adapter, CONFIG, load_adapter),
        (base, "model.safetensors", model_weights),
        (base, "config.json", model_weights),
    ):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        assert name in refused(lambda call=call, folder=folder: call(folder))
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


def test_the_cache_of_the_hub_is_read(adapter: Path, tmp_path: Path) -> None:
    """Its snapshots are links to blobs."""
    repository = tmp_path / "models--somebody--something"
    snapshot = repository / "snapshots" / "1234"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, name in enumerate((CONFIG, WEIGHTS)):
        (adapter / name).rename(repository / "blobs" / f"{i}")
        (snapshot / name).symlink_to(os.path.relpath(repository / "blobs" / f"{i}", snapshot))
    assert load_adapter(snapshot).layers
    gk.project_adapter(snapshot, gk.identify(snapshot, k=1), tmp_path / "out")
    assert not (tmp_path / "out" / CONFIG).is_symlink()


# --- values of files


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", "32"),
        ("lora_alpha", [32]),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 1e308),
        ("lora_alpha", 0),
        ("lora_alpha", True),
        ("r", "4"),
        ("r", 4.0),
        ("r", 0),
        ("r", None),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", "q_proj"),
        ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", "x"),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("alpha_pattern", {"*": 4}),
        ("auto_mapping", "x"),
        ("auto_mapping", {"parent_library": 3}),
        ("target_parameters", 5),
        ("base_model_name_or_path", 3),
        ("use_rslora", "yes"),
        ("use_dora", 1),
        ("init_lora_weights", [1]),
        ("layer_replication", [[0, 10**9]]),
        ("peft_type", ["LORA"]),
        ("peft_type", FOREIGN),
    ],
)
def test_values_that_peft_does_not_write(field: str, value: Any, adapter: Path) -> None:
    edit_json(adapter / CONFIG, **{field: value})
    said = refused(lambda: load_adapter(adapter))
    assert CONFIG in said and printable(said) == said
    assert (
        field in said
        or "adapter; only peft's LORA" in said
        or field == "rank_pattern"
        or field == "alpha_pattern"
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff\xfe{}", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"],
)
@pytest.mark.parametrize(
    "name", [CONFIG, f"{WEIGHTS}.index.json", "config.json", "model.safetensors.index.json"]
)
def test_json_that_is_none(name: str, content: bytes, adapter: Path, base: Path) -> None:
    folder = base if name in ("config.json", "model.safetensors.index.json") else adapter
    if name == f"{WEIGHTS}.index.json":
        (adapter / WEIGHTS).unlink()
    (folder / name).write_bytes(content)
    call = model_weights if folder is base else load_adapter
    said = refused(lambda: call(folder))
    assert name in said and "again" in said


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_files_that_are_cut_short(keep: int, adapter: Path, base: Path, tmp_path: Path) -> None:
    subspace = tmp_path / "s.safetensors"
    gk.identify(adapter, k=1).save(subspace)
    for file in (adapter / WEIGHTS, base / "model.safetensors", subspace):
        file.write_bytes(file.read_bytes()[:keep])
    calls = {
        WEIGHTS: lambda: load_adapter(adapter),
        "model.safetensors": lambda: model_weights(base),
        "base": lambda: load_adapter(adapter, base_model=base),
        "s.safetensors": lambda: gk.Subspace.load(subspace),
    }
    for name, call in calls.items():
        said = refused(call)
        assert ("adapter_model" if name == "base" else name) in said
        assert "not a complete safetensors file" in said


HEADERS: dict[str, Any] = {
    "no object": [],
    "nothing": {},
    "version as text": {"version": "5"},
    "an older version": {"version": 4},
    "notes a text": {"notes": "good"},
    "notes of numbers": {"notes": [1]},
    "no notes": {"notes": None},
    "metadata a list": {"metadata": []},
    "model type": {"metadata": {"model_type": ["llama"]}},
    "not JSON": "{",
}
TENSORS: dict[str, dict[str, Any]] = {
    "no basis": {"basis": None},
    "of another dtype": {"basis": torch.eye(8)[:, :1].double()},
    "not orthonormal": {"basis": torch.ones(8, 1)},
    "a tensor of nobody": {"other": torch.ones(2)},
    "a gain of another width": {"gain.norm": torch.ones(7)},
    "a gain of integers": {"gain.norm": torch.ones(8, dtype=torch.int32)},
    "a gain that is no number": {"gain.norm": torch.full((8,), torch.nan)},
}


@pytest.mark.parametrize("case", [*HEADERS, *TENSORS])
def test_files_that_are_no_subspace(case: str, tmp_path: Path) -> None:
    path, key = tmp_path / "s.safetensors", "grasp_kernels.subspace"
    whole: dict[str, Any] = {"version": 5, "notes": [], "metadata": {}}
    basis = {"basis": torch.eye(8)[:, :1].contiguous()}
    tensors = {k: t for k, t in {**basis, **TENSORS.get(case, {})}.items() if t is not None}
    change = HEADERS.get(case, {"notes": []})
    if isinstance(change, dict):
        text = json.dumps({**whole, **change} if change else {})
    else:
        text = change if isinstance(change, str) else json.dumps(change)
    save_file(tensors, path, metadata={key: text})
    said = refused(lambda: gk.Subspace.load(path))
    assert str(path) in said and "identify" in said
    save_file(basis, path, metadata={key: json.dumps(whole)})
    assert gk.Subspace.load(path).k == 1


# --- what would cost time


def test_a_pattern_is_a_name(adapter: Path) -> None:
    """Nested repetition takes exponential time where it does not match."""
    start = time.monotonic()
    for pattern in ("(.*?){25}[0-9]", r"(layers\.\d+\.)?self_attn\.[qo]_proj"):
        edit_json(adapter / CONFIG, rank_pattern={pattern: 4})
        assert "which is not the name of a module" in refused(lambda: load_adapter(adapter))
    assert time.monotonic() - start < 60
    name = load_adapter_names(adapter)[0]
    edit_json(adapter / CONFIG, rank_pattern={f"^{name}": 4, "^o_proj": 9, "down_proj": 4})
    assert len(load_adapter(adapter).layers) == 9


def load_adapter_names(adapter: Path) -> list[str]:
    edit_json(adapter / CONFIG, rank_pattern={})
    return [layer.name for layer in load_adapter(adapter).layers]


def test_the_patterns_of_a_file_are_never_given_to_peft(adapter: Path) -> None:
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        edit_json(adapter / CONFIG, **{field: "(.*?){25}[0-9]"})
    start = time.monotonic()
    with open_pair(tiny_model(), adapter) as pair:
        names = [n for n, m in pair.model.named_modules() if hasattr(m, "lora_A")]
    assert len(names) == 9 and time.monotonic() - start < 60


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_the_size_of_an_adapter_does_not_count(size: float, adapter: Path) -> None:
    wanted = gk.identify(adapter, k=1).basis
    tensors = {key: one * size for key, one in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    torch.testing.assert_close(gk.identify(adapter, k=1).basis, wanted)


# --- text of others


def test_text_of_others_is_only_text() -> None:
    for text in (inert(FOREIGN), cell(FOREIGN)):
        assert printable(text) == text and "\n" not in text
        assert not any(mark in text for mark in ("<", ">", "](", "|", "`", "*"))
    assert inert("# title").startswith("\\#") and inert("[a]: http://h") == "[a] : http://h"
    assert inert("model.layers.0.self_attn.o_proj") == "model.layers.0.self_attn.o_proj"


def test_names_in_files_forge_no_line_of_an_audit(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subspace = gk.identify(adapter, k=1)
    tensors = load_file(adapter / WEIGHTS)
    tensors[f"base_model.model.{FOREIGN}"] = torch.ones(2)
    stem = f"base_model.model.{FOREIGN.strip()}.lora_"
    tensors |= {f"{stem}A.weight": torch.ones(4, 3), f"{stem}B.weight": torch.ones(3, 4)}
    save_file(tensors, adapter / WEIGHTS)
    edit_json(adapter / CONFIG, base_model_name_or_path=FOREIGN)
    gk.Subspace(subspace.basis, notes=(FOREIGN,)).save(tmp_path / "s")
    commands = (
        ["identify", str(adapter), "--k", "1", "--output", str(tmp_path / "t")],
        ["check", str(adapter), str(tmp_path / "s")],
        ["project", str(adapter), str(tmp_path / "s"), "--output", str(tmp_path / "out")],
    )
    for command in commands:
        main(command)
        said = "".join(capsys.readouterr())
        lines = said.splitlines()
        assert "Verdict: clean" in said and "error:" not in said, command
        assert all(printable(line) == line for line in lines), command
        assert not any(mark in said for mark in ("\n#", "<img", "](http")), command


def test_answers_and_reasons_forge_no_line_of_a_report() -> None:
    told = {"prompt": FOREIGN, "base": FOREIGN, "adapter": [[FOREIGN, True]], "changed": True}
    table = answers_table({"the adapter": [told]})
    assert len(table.splitlines()) == 3 and all(line.count("|") == 4 for line in table.splitlines())
    numbers: dict[str, Any] = {
        "adapter": FOREIGN,
        "verdict": "weak",
        "reasons": [FOREIGN],
        "answers": {"unrelated": [told], "training": [told]},
        "effect": {"tokens": {way: [{"token": FOREIGN, "score": 0.1}] for way in ("up", "down")}},
        "model": {"type": FOREIGN, "layers": 1, "named": FOREIGN, "given": "base"},
        "prompts": {"unrelated": 1, "training": 1},
        "versions": {"grasp_kernels": "1", "torch": "2"},
    }
    text = diagnosis_text(numbers)
    assert "<img" not in text and "](http" not in text and "\x1b" not in text
    assert sum(line.startswith("# ") for line in text.splitlines()) == 1
