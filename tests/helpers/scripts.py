"""The scripts in benchmarks/ as modules, those in examples/ as commands."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
BENCHMARKS, EXAMPLES = ROOT / "benchmarks", ROOT / "examples"


def load_script(name: str) -> ModuleType:
    """`benchmarks/NAME.py`, without running its main."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_example(name: str, *arguments: object) -> str:
    """Run `examples/NAME`; what it prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
