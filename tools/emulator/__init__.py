"""Build and load the CUDA kernels for a CPU; README.md has the whole of it."""

import ctypes
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent
TORCH = Path(torch.__file__).parent
# The parts that a GPU would be: compute capability, multiprocessors, bytes of shared memory. Few
# multiprocessors make small tests loop.
PARTS = {"sm_80": (8, 6, 163 << 10), "sm_90": (9, 8, 227 << 10), "sm_120": (12, 6, 99 << 10)}
FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    # Kernels read elements of two bytes in words of sixteen.
    *("-fno-strict-aliasing", "-Wno-psabi", "-Wno-unknown-pragmas"),
)
# Stacks of fibers are used again, which the sanitizer takes for overflows of theirs.
WATCHED = (
    *("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("--param", "asan-stack=0"),
)
INCLUDES = (EMULATOR, ROOT / "csrc", TORCH / "include")


def sources() -> list[Path]:
    """All that is compiled; csrc/device and the host module are what the emulator stands for."""
    csrc = ROOT / "csrc"
    own = sorted(csrc.glob("*.cu")) + sorted(set(csrc.glob("*.cpp")) - {csrc / "host.cpp"})
    return own + sorted(path for path in EMULATOR.glob("*.cpp") if path.stem != "selftest")


def sanitized() -> dict[str, str]:
    """The environment of a process that watches memory."""

    def runtime(name: str) -> str:
        found = ["g++", f"-print-file-name={name}"]
        return subprocess.run(found, capture_output=True, text=True, check=True).stdout.strip()

    return {
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


def library() -> Path:
    """The built library; processes that come at the same time wait for the first."""
    watched = "libasan" in os.environ.get("LD_PRELOAD", "")
    name, flags = ("watched", FLAGS + WATCHED) if watched else ("emulated", FLAGS)
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / f"{name}-{_digest(flags)}.so"
        if not made.exists():
            for old in folder.glob(f"{name}-*"):
                old.unlink()
            _build(made, flags)
    return made


def load() -> None:
    """Register the operators, if no GPU has registered its own."""
    from grasp_kernels.ops.lora_linear.cuda import library as operators

    if torch.cuda.is_available():
        return
    operators.load(library())
    configure(0)


def configure(seed: int) -> None:
    """How later launches order what CUDA leaves open: 0 in turn, odd late, even at random."""
    _functions().grasp_emulator_configure(ctypes.c_uint64(seed))


@contextmanager
def part(name: str) -> Iterator[None]:
    """Inside, launches are planned for a part."""
    _functions().grasp_emulator_part(*PARTS[name])
    try:
        yield
    finally:
        _functions().grasp_emulator_part(*PARTS["sm_90"])


def _functions() -> ctypes.CDLL:
    return ctypes.CDLL(str(library()))


def _digest(flags: tuple[str, ...]) -> str:
    found = hashlib.sha256(f"{torch.__version__} {flags}".encode())
    for folder in (ROOT / "csrc", EMULATOR):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _build(made: Path, flags: tuple[str, ...]) -> None:
    include = [f"-I{folder}" for folder in INCLUDES]
    objects = [made.with_name(f"{made.stem}-{path.name}.o") for path in sources()]

    def compiled(pair: tuple[Path, Path]) -> None:
        _run("g++", *flags, *include, "-x", "c++", "-c", str(pair[0]), "-o", str(pair[1]))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compiled, zip(sources(), objects, strict=True)))
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    partial = made.with_suffix(".partial")
    _run("g++", *flags, "-shared", *map(str, objects), "-o", str(partial), *libraries)
    partial.rename(made)
    for path in objects:
        path.unlink()


def _run(*command: str) -> None:
    # The compiler itself is not watched.
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
