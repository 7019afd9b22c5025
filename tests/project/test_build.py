"""How the package is built: what is compiled for what, what wheel and sdist hold, and if they work.

Kernels that stand in for the real ones keep this fast; the real ones are looked at as this tree's
own build left them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import grasp_kernels
from build_support import LeftOut, architectures, extensions, ptxas
from build_support.toolkit import find_toolkit
from grasp_kernels.cli import main
from grasp_kernels.config import BACKENDS
from tests.helpers.nvcc import needs_nvcc

ROOT = Path(__file__).parents[2]
PACKAGE = Path(grasp_kernels.__file__).parent
KNOWN = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")  # of nvcc 12.8
FOLDERS = (
    *("benchmarks", "build_support", "csrc", "docs"),
    *("examples", "grasp_kernels", "tests", "tools"),
)
MADE = (".so", ".pyc", ".o")  # from sources; not under version control
STAND_IN = """
namespace grasp {
template <typename T, int kIndex>
__global__ void pass_kernel(T* data) { data[threadIdx.x] *= T(kIndex); }
template __global__ void pass_kernel<float, 0>(float*);
}  // namespace grasp
"""


# ---- architectures --------------------------------------------------------------------------


def chosen(asked: str | None, known: tuple[str, ...] = KNOWN) -> list[str]:
    return [str(target) for target in architectures.choose(asked, known)[0]]


def test_default_architectures_are_those_that_nvcc_knows() -> None:
    assert chosen(None) == ["sm_80", "sm_90a", "sm_100", "sm_120"]
    assert chosen("") == chosen(None)
    targets, remarks = architectures.choose(None, KNOWN[:4])
    assert [str(target) for target in targets] == ["sm_80", "sm_90a"]
    assert remarks == [
        "10.0 is left out, this nvcc does not know it",
        "12.0 is left out, this nvcc does not know it",
    ]


def test_the_list_of_the_user_is_obeyed() -> None:
    assert chosen("8.6;8.9") == ["sm_86", "sm_89"]
    assert chosen("12.0a, 8.0 8.0") == ["sm_120a", "sm_80"]
    assert chosen("Ada") == ["sm_89"]


def test_hopper_gets_its_own_instructions() -> None:
    targets, remarks = architectures.choose("9.0", KNOWN)
    assert targets[0].flags == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert remarks == ["9.0 is compiled as 9.0a, which has the instructions of Hopper"]
    assert chosen("9.0;9.0a") == ["sm_90a"]


def test_ptx_is_that_of_the_plain_architecture() -> None:
    (target,), _ = architectures.choose("9.0+PTX;9.0a", KNOWN)
    assert target.flags == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_old_architectures_are_left_out() -> None:
    targets, remarks = architectures.choose("7.0;7.5;8.0", KNOWN)
    assert [str(target) for target in targets] == ["sm_80"]
    assert remarks[1] == "7.5 is left out, the CUDA kernels need 8.0 or newer"
    with pytest.raises(LeftOut, match=r"nothing is left of the architectures 7\.0"):
        architectures.choose("7.0", KNOWN)


def test_what_is_no_architecture_is_named() -> None:
    with pytest.raises(SystemExit, match="'sm_80', which is no architecture; write numbers"):
        architectures.choose("sm_80", KNOWN)


# ---- toolkit --------------------------------------------------------------------------------


def fake_toolkit(folder: Path, version: str) -> dict[str, str]:
    """An environment with an nvcc that tells its version and does nothing else."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f"echo 'release, V{version}.1'\n"
        "echo 'sm_80 sm_90'\n"
        f"echo '#$ TOP={folder}/bin/..'\n"
    )
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(folder)}


def test_toolkit_is_where_nvcc_says(tmp_path: Path) -> None:
    environment = fake_toolkit(tmp_path / "real", "12.8")
    (tmp_path / "real" / "lib64").mkdir()
    (tmp_path / "real" / "lib64" / "libcudart_static.a").touch()
    (tmp_path / "link" / "bin").mkdir(parents=True)
    (tmp_path / "link" / "bin" / "nvcc").symlink_to(Path(environment["CUDA_HOME"], "bin", "nvcc"))
    toolkit = find_toolkit({"PATH": str(tmp_path / "link" / "bin")})
    assert toolkit.home == (tmp_path / "real").resolve()
    assert toolkit.version == "12.8.1"
    assert {"sm_80", "sm_90"} <= toolkit.known
    assert toolkit.libraries == [str(toolkit.home / "lib64")]


def test_unfit_toolkits_are_named(tmp_path: Path) -> None:
    with pytest.raises(LeftOut, match="nvcc was not found"):
        find_toolkit({"CUDA_HOME": str(tmp_path)})
    with pytest.raises(LeftOut, match=r"nvcc 11\.8\.1 is too old"):
        find_toolkit(fake_toolkit(tmp_path / "old", "11.8"))
    with pytest.raises(LeftOut, match=r"has no libcudart_static\.a"):
        find_toolkit(fake_toolkit(tmp_path / "bare", "13.0"))


def test_force_cuda_asks_and_forbids(tmp_path: Path) -> None:
    assert extensions.wanted({}) is None
    assert extensions.wanted({"FORCE_CUDA": "1"}) is True
    assert extensions.wanted({"FORCE_CUDA": "0"}) is False
    with pytest.raises(LeftOut, match="FORCE_CUDA=0 is set"):
        extensions.plan_kernels({"FORCE_CUDA": "0"})
    done = python(ROOT, "setup.py", "--name", FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "grasp_kernels: FORCE_CUDA asks for the CUDA kernels, but nvcc was not found; "
        "install the CUDA toolkit or set CUDA_HOME."
    )


# ---- what ptxas says ------------------------------------------------------------------------

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 640 bytes smem
ptxas info    : Compile time = 1.5 ms
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90a'
ptxas info    : Function properties for _Z1gv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""


def test_kernels_are_read_from_the_report() -> None:
    assert ptxas.parse(REPORT) == [
        ptxas.Kernel("_Z1fv", "sm_80", 255, 24, 20, 640),
        ptxas.Kernel("_Z1gv", "sm_90a", 40, 0, 0, 0),
    ]


def test_recorder_keeps_everything_and_shows_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = REPORT + "warning: something\n"
    command = [sys.executable, "-c", f"import sys; sys.stderr.write({said!r}); sys.exit(3)"]
    made = tmp_path / "a.o"
    assert ptxas.record([*command, "-o", str(made)]) == 3
    assert capsys.readouterr().err == "warning: something\n"
    assert (tmp_path / "a.o.ptxas").read_text() == said
    assert [kernel.symbol for kernel in ptxas.read([made, tmp_path / "b.o"])] == ["_Z1fv", "_Z1gv"]


# ---- wheel and sdist ------------------------------------------------------------------------


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own in a folder; what steers builds from outside is not passed on."""
    steering = ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_PATH", "PYTORCH_NVCC", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in steering}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def tree(folder: Path) -> Path:
    """A copy of what is under version control."""
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, folder)
    return folder


def built(folder: Path, what: str, **environment: str) -> tuple[Path, str]:
    """What the backend that pip calls makes of a tree, and what it prints."""
    code = f"from setuptools import build_meta\nprint(build_meta.build_{what}('dist'))"
    done = python(folder, "-c", code, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist" / done.stdout.splitlines()[-1], done.stdout


def installed(wheel: Path, folder: Path) -> Path:
    """The commands of an environment with the wheel alone, which sees the torch of this one."""
    venv.create(folder, with_pip=False)
    interpreter = folder / "bin" / "python"
    options = ["--python", str(interpreter), "install", "--quiet", "--no-deps", "--no-index"]
    done = python(folder, "-m", "pip", *options, str(wheel))
    assert done.returncode == 0, done.stderr
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "outside.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder / "bin"


def run(commands: Path, *command: str) -> str:
    done = subprocess.run(
        [str(commands / command[0]), *command[1:]], cwd=commands, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def check_wheel(wheel: Path) -> None:
    names = contents(wheel)
    assert "grasp_kernels/py.typed" in names
    assert any(name.startswith("grasp_kernels/_host.") for name in names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"grasp_kernels"}


@pytest.mark.slow
def test_wheel_without_nvcc_says_so_and_works(tmp_path: Path) -> None:
    folder = tree(tmp_path / "tree")
    wheel, printed = built(folder, "wheel", CUDA_HOME=str(tmp_path / "no-cuda"))
    assert (
        "grasp_kernels: nvcc was not found, the CUDA kernels are left out "
        "(install the CUDA toolkit or set CUDA_HOME to have them)"
    ) in printed
    check_wheel(wheel)
    assert "grasp_kernels/_C.so" not in contents(wheel)
    commands = installed(wheel, tmp_path / "venv")
    where = run(commands, "python", "-c", "import grasp_kernels as g; print(g.__file__)")
    assert where.startswith(str(commands.parent))
    report = run(commands, "grasp-kernels", "doctor")
    assert all(f"backend {name}" in report for name in BACKENDS)
    assert "CUDA kernels       not built" in report
    release = ".".join(torch.__version__.split(".")[:2])
    assert f"calls of layers    compiled for torch {release}" in report


@pytest.mark.slow
@needs_nvcc
def test_wheel_with_nvcc_has_kernels_and_tells_of_them(tmp_path: Path) -> None:
    folder = tree(tmp_path / "tree")
    for file in [*(folder / "csrc").rglob("*.cu"), *(folder / "csrc").rglob("*.cpp")]:
        if file.name != "host.cpp" or file.parent.name != "csrc":
            file.unlink()
    (folder / "csrc" / "call" / "plan.cpp").write_text("#error not today")
    (folder / "csrc" / "stand_in.cu").write_text(STAND_IN)
    wheel, printed = built(folder, "wheel", TORCH_CUDA_ARCH_LIST="9.0", FORCE_CUDA="1")
    assert "grasp_kernels: compiling the CUDA kernels for sm_90a" in printed
    check_wheel(wheel)
    assert "grasp_kernels/_C.so" in contents(wheel)
    code = "import json\nfrom grasp_kernels import _host\nprint(json.dumps(_host.kernels()))"
    commands = installed(wheel, tmp_path / "venv")
    assert "grasp_kernels: the calls of layers do not compile (" in printed
    calls = "from grasp_kernels.layers.plan import compiled\nprint(compiled())"
    assert run(commands, "python", "-c", calls) == "not built\n"
    (kernel,) = json.loads(run(commands, "python", "-c", code))
    assert kernel["name"] == "pass_kernel<float, 0>"
    assert kernel["arch"] == "sm_90a"
    assert kernel["registers"] > 0
    assert kernel["local_memory"] == kernel["spilled"] == 0


@pytest.mark.slow
def test_sdist_has_what_a_build_and_its_tests_need(tmp_path: Path) -> None:
    sdist, _ = built(tree(tmp_path / "tree"), "sdist", FORCE_CUDA="0")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in FOLDERS:
        files = {file for file in (ROOT / folder).rglob("*") if file.is_file()}
        sources = {str(f.relative_to(ROOT)) for f in files if f.suffix not in MADE}
        assert sources - names == set()
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "docs/method.md"} <= names
    assert not [name for name in names if name.endswith(MADE)]


# ---- this tree's own build ------------------------------------------------------------------


def sections(library: Path) -> str:
    return subprocess.run(
        ["readelf", "--dynamic", str(library)], capture_output=True, text=True, check=True
    ).stdout


@needs_nvcc
def test_library_loads_beside_any_torch() -> None:
    library = PACKAGE / "_C.so"
    assert library.exists(), "nvcc is there but the kernels were not built; run make"
    needed = [line for line in sections(library).splitlines() if "NEEDED" in line]
    assert any("[libtorch.so]" in line for line in needed)
    for name in ("torch_cuda", "c10", "cudart", "libcuda", "torch_python", "libpython"):
        assert not any(name in line for line in needed), name
    done = python(ROOT, "-c", f"import torch\ntorch.ops.load_library({json.dumps(str(library))})")
    assert done.returncode == 0, done.stderr


@needs_nvcc
def test_the_compiler_has_no_objections() -> None:
    records = [ROOT / extensions.OBJECTS / f"csrc/{f.stem}.o.ptxas" for f in ROOT.glob("csrc/*.cu")]
    for file in records:
        for line in file.read_text(encoding="utf-8").splitlines():
            assert "Performance Loss" not in line and "warning" not in line, f"{file.name}: {line}"


@needs_nvcc
def test_host_tells_of_every_kernel() -> None:
    from grasp_kernels import _host

    build: Mapping[str, object] = _host.build_info()
    plan = extensions.plan_kernels(os.environ)
    assert build["nvcc"] == plan.toolkit.version
    kernels = _host.kernels()
    assert {kernel["arch"] for kernel in kernels} == set(_host.build_info()["architectures"])
    for kernel in kernels:
        assert 0 < kernel["registers"] <= 255
        assert kernel["registers"] * kernel["max_threads"] <= 65536, kernel
        assert kernel["shared_memory"] <= 227 * 1024, kernel
        assert kernel["spilled"] == 0, kernel


@needs_nvcc
def test_doctor_lists_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    from grasp_kernels import _host

    assert main(["doctor", "--kernels"]) == 0
    summary, table = capsys.readouterr().out.split("\n\n")
    kernels = _host.kernels()
    assert re.search(rf"^CUDA kernels +{len(kernels)} for sm_", summary, re.MULTILINE)
    names = [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()[2:]]
    assert names == [kernel["name"] for kernel in kernels]
