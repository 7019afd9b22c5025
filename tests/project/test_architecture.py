"""The arrows between the folders, what an import loads, and what the code never does."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import grasp_kernels as gk

ROOT = Path(gk.__file__).parent
# Each folder or file imports from lower layers alone, and from those named beside it in its own.
LAYERS: tuple[dict[str, set[str]], ...] = (
    {
        **{leaf: set() for leaf in ("cpu", "inert", "processes", "svd", "version")},
        "files": {"inert"},
        "progress": {"processes"},
    },
    {"data": set(), "models": set(), "ops": set(), "pages": set()},
    {"adapters": set()},
    {"subspace": set()},
    {"config": set(), "layers": set(), "regularizer": set(), "diagnosis": set()},
    {"training": set()},
    {"bench": set(), "pipeline": set()},
    {"cli": set()},
)
ALLOWED = {
    part: {lower for below in LAYERS[:depth] for lower in below} | beside
    for depth, layer in enumerate(LAYERS)
    for part, beside in layer.items()
}


def imports(file: Path) -> Iterator[str]:
    """Every module of the package that a file imports, without the package's own name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "grasp_kernels":
            for name in node.names:
                yield gk._HOMES.get(name.name, name.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grasp_kernels."):
            yield str(node.module).removeprefix("grasp_kernels.")
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("grasp_kernels."):
                    yield name.name.removeprefix("grasp_kernels.")


def test_every_folder_has_its_arrows() -> None:
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__main__", "__pycache__"} == set(ALLOWED)


@pytest.mark.parametrize("stage", sorted(ALLOWED))
def test_arrows(stage: str) -> None:
    files = (
        [ROOT / f"{stage}.py"] if (ROOT / f"{stage}.py").exists() else (ROOT / stage).rglob("*.py")
    )
    for file in files:
        for module in imports(file):
            target = module.split(".")[0]
            assert target in ALLOWED[stage] | {stage}, f"{file.name} imports {module}"


def test_the_operator_imports_no_backend() -> None:
    names = ("aten", "reference", "cuda", "triton")
    backends = {f"ops.lora_linear.{name}" for name in names}
    for part in ("api", "differentiated", "registry"):
        assert not backends & set(imports(ROOT / "ops" / "lora_linear" / f"{part}.py"))


def loaded_after(statement: str, *modules: str) -> set[str]:
    """Which of the modules a fresh process has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*[m for m in {modules!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = ("peft", "transformers", "datasets", "accelerate", "safetensors", "markdown_it", "tqdm")


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import grasp_kernels", "torch", "triton", "numpy", *HEAVY) == set()
    assert loaded_after("import grasp_kernels.cli", "torch", *HEAVY) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["lora_linear", "identify", "Subspace", "leakage", "project_adapter"]
)
def test_these_names_need_torch_alone(name: str) -> None:
    loaded = loaded_after(f"from grasp_kernels import {name}", "torch", *HEAVY)
    assert loaded - {"tqdm"} == {"torch"}  # torch itself loads tqdm


def test_every_public_name_exists() -> None:
    for name in gk.__all__:
        assert getattr(gk, name) is not None
    assert set(gk.__all__) <= set(dir(gk))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = gk.nothing


def test_no_pickle_and_no_environment_variables() -> None:
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        words = ["torch.load", "torch.save", "import pickle", "os.environ", "getenv"]
        if file.name == "processes.py":  # launchers speak to processes by variables
            words.remove("os.environ")
        for word in words:
            assert word not in text, f"{file.name} uses {word}"
