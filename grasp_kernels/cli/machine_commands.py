"""`grasp-kernels doctor`, `bench`: versions, and which backend runs and is fastest here."""

from __future__ import annotations

import argparse
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from typing import Any

from grasp_kernels.cli.options import add_command
from grasp_kernels.pages.markdown import table
from grasp_kernels.progress import bar
from grasp_kernels.version import TESTED, __version__

_PACKAGES = (*TESTED, "safetensors")


def add_doctor(commands: Any) -> None:
    parser = add_command(
        commands, "doctor", _doctor, "show versions, GPU and backends, and why a backend cannot run"
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="list every compiled CUDA kernel with its registers, memory and threads",
    )


def _doctor(arguments: argparse.Namespace) -> int:
    """Show the installed versions, the backends that can run, and why the others cannot."""
    rows = {"grasp_kernels": __version__, "python": platform.python_version()}
    rows.update({package: _installed(package) for package in _PACKAGES})
    rows["GPU"] = _gpu()
    host: Any = None  # the compiled module with the facts of this build
    if find_spec("grasp_kernels._host") is not None:
        host = import_module("grasp_kernels._host")
    rows["calls of layers"] = _calls()
    rows["CUDA kernels"] = _kernels(host)

    from grasp_kernels.models.checkpoint import device
    from grasp_kernels.ops.lora_linear import registry

    measured, least = registry.measured_on(device()), registry.LEAST_TOKENS
    for name, reason in registry.backends().items():
        runs = "runs"
        if name in registry.KERNELS and not measured:
            runs = "runs; never timed on such a GPU, so auto does not choose it"
        rows[f"backend {name}"] = runs if reason is None else f"does not run: {reason}"
    rows["backend auto"] = "chooses aten: no kernel was measured to be faster here"
    if measured:
        rows["backend auto"] = f"chooses kernels for bfloat16 calls of {least} tokens or more"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    if arguments.kernels and host is not None:
        print()
        lines = [[str(kernel[column]) for column in _COLUMNS] for kernel in host.kernels()]
        print(table(list(_COLUMNS), lines))
    return 0


def _installed(package: str) -> str:
    """Return the release of a package, compared with the tested releases."""
    from torch.torch_version import TorchVersion

    try:
        found = version(package)
    except PackageNotFoundError:
        return "not installed"
    if package not in TESTED:
        return found
    oldest, newest = TESTED[package]
    release = TorchVersion(found.partition("+")[0])  # "2.10.0+cu128" is 2.10.0
    if release < oldest:
        return f"{found}, older than {oldest}, the oldest that was tested"
    if release > newest:
        return f"{found}, newer than {newest}, the newest that was tested"
    return f"{found}, within {oldest} to {newest}"


def _calls() -> str:
    """Say whether the calls of layers are compiled, or why they are in Python."""
    if find_spec("peft") is None:
        return "none, peft is not installed"
    import torch

    from grasp_kernels.layers.plan import compiled

    found = compiled()
    if not isinstance(found, str):
        return f"compiled for torch {'.'.join(torch.__version__.split('.')[:2])}"
    return (
        f"in Python, short ones two to three times slower: {found} (to compile them, install with "
        "a C++ compiler and with pip's --no-build-isolation)"
    )


def _kernels(host: Any) -> str:
    """Return one line on the CUDA kernels."""
    build = {} if host is None else host.build_info()
    if not build.get("nvcc"):
        return "not built (to build them, install with nvcc and with pip's --no-build-isolation)"
    kernels = host.kernels()
    spilling = sorted({kernel["name"] for kernel in kernels if kernel["spilled"]})
    return (
        f"{len(kernels)} for {', '.join(build['architectures'])}, by nvcc {build['nvcc']}, for "
        f"torch {build['torch_abi']} or newer; registers spill in {', '.join(spilling) or 'none'}"
    )


_COLUMNS = (  # memory is in bytes
    "name", "shape", "arch", "registers", "shared_memory", "local_memory", "spilled", "max_threads",
)  # fmt: skip


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"none in use (torch was built for {torch.version.cuda or 'CPU only'})"
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    names = (f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus)
    return f"{', '.join(names)}, CUDA {torch.version.cuda}"


def add_bench(commands: Any) -> None:
    bench = add_command(commands, "bench", _bench, "time stock peft and every backend")
    for name, kind, what in (
        (
            "--model",
            str,
            "model with the shapes of the layers (default: llama-3.1-8b; on a CPU qwen2.5-0.5b)",
        ),
        ("--dtype", str, "dtype: float32, float16 or bfloat16 (default: bfloat16)"),
        ("--tokens", int, "tokens in a call (default: 8192; on a CPU 512)"),
        ("--rank", int, "rank of the adapter (default: 16)"),
        ("--basis", int, "number of directions that are projected, 0 for none (default: 4)"),
        ("--seconds", float, "least time to measure each of them (default: 0.5)"),
        ("--device", str, "cpu or cuda (default: cuda if there is a GPU)"),
    ):
        bench.add_argument(name, type=kind, help=what)


def _bench(arguments: argparse.Namespace) -> int:
    """Check every backend against float64.

    Then time the forward and backward passes of a model's linear layers with stock peft and with
    all backends, in turn.
    """
    from grasp_kernels.bench import Refusal, compare, report

    given = {name: getattr(arguments, name) for name in signature(compare).parameters}
    chosen = {name: value for name, value in given.items() if value is not None}
    timed = list(bar(compare(**chosen), desc="benchmark", unit="layer"))
    print(report(timed))
    found = [time for line in timed for time in line.found.values()]
    return int(any(isinstance(t, Refusal) and t.kind in ("wrong", "failed") for t in found))
