"""The CUDA toolkit at hand."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from build_support import LeftOut

OLDEST = (12, 5)  # cudaGetDriverEntryPointByVersion
USUAL = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str
    known: frozenset[str]  # machine code that nvcc makes: sm_80, sm_90, …

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def includes(self) -> list[str]:
        return _existing(self.home / "include", *self.home.glob("targets/x86_64-linux/include"))

    @property
    def libraries(self) -> list[str]:
        """Folders of the static runtime."""
        folders = (self.home / "lib64", self.home / "lib", self.home / "targets/x86_64-linux/lib")
        return _existing(*(f for f in folders if (f / "libcudart_static.a").exists()))


def find_toolkit(environment: Mapping[str, str]) -> Toolkit:
    """The toolkit of CUDA_HOME or CUDA_PATH; without them of the nvcc on the path, or the usual."""
    nvcc = _nvcc(environment)
    if nvcc is None:
        raise LeftOut("nvcc was not found", "install the CUDA toolkit or set CUDA_HOME")
    version = _search(r"V(\d+\.\d+\.\d+)", _output(nvcc, "--version"))
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise LeftOut(f"nvcc {version} is too old", f"install CUDA {wanted} or newer")
    # nvcc on the path may be a link or a script; nvcc itself knows where it lives.
    home = _search(r"TOP=(.+)", _output(nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"))
    known = frozenset(_output(nvcc, "--list-gpu-code").split())
    toolkit = Toolkit(Path(home.strip()).resolve(), version, known)
    if not toolkit.libraries:
        raise LeftOut(
            f"the CUDA toolkit in {toolkit.home} has no libcudart_static.a",
            "install the development files of the CUDA runtime",
        )
    return toolkit


def _nvcc(environment: Mapping[str, str]) -> Path | None:
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if home:
        found = Path(home) / "bin" / "nvcc"
    else:
        found = Path(shutil.which("nvcc", path=environment.get("PATH")) or USUAL / "bin" / "nvcc")
    return found if found.exists() else None


def _output(nvcc: Path, *options: str) -> str:
    done = subprocess.run([str(nvcc), *options], capture_output=True, text=True)
    return done.stdout + done.stderr


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise LeftOut(
            f"nvcc does not work: {text.strip()!r}", "repair the toolkit or its C++ compiler"
        )
    return found.group(1)


def _existing(*folders: Path) -> list[str]:
    return [str(folder) for folder in folders if folder.is_dir()]
