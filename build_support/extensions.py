"""The native parts of the package; each is left out with a message where it cannot be built.

`_C`, the CUDA kernels as operators of torch, is a plain shared library without Python. It uses
torch's stable ABI and carries the CUDA runtime, so it loads beside any torch from 2.10 on, one
without CUDA too. FORCE_CUDA=1 makes its absence an error. `_host` tells of them.

`_call`, the calls of small layers, uses torch's C++ classes, which change from release to release:
its name carries the release of torch that it was built with.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

from build_support import LeftOut, architectures, ptxas
from build_support.toolkit import Toolkit, find_toolkit

KERNELS = "grasp_kernels._C"
HOST = "grasp_kernels._host"
CALL = "grasp_kernels._call_"
SOURCES = Path("csrc")
CALL_SOURCES = SOURCES / "call"
HOST_SOURCE = SOURCES / "host.cpp"
OBJECTS = Path("build") / "kernels"  # kept between builds, also by editable installs
TORCH = (2, 10)
HEADER = "grasp_built.h"


@dataclass(frozen=True)
class Plan:
    """The CUDA kernels that are going to be compiled."""

    toolkit: Toolkit
    targets: list[architectures.Target]
    forced: bool  # a failure is an error


def setup_arguments(version: str) -> dict[str, Any]:
    """What `setup` is told of native parts."""
    plan = _plan_or_message(os.environ)
    extensions = []
    if plan is not None:
        extensions.append(_kernels(plan))
    if find_spec("torch") is not None:
        extensions.append(_call())
    else:
        print(
            "grasp_kernels: torch is not installed where the build runs, so calls of layers are "
            "not compiled (install torch and use pip install --no-build-isolation to have them)"
        )
    if find_spec("pybind11") is not None:
        extensions.append(_host())  # last: its table is what the compiler said of the kernels
    else:
        print("grasp_kernels: pybind11 is not installed, the module _host is left out")
    return {"ext_modules": extensions, "cmdclass": {"build_ext": _command(plan, version)}}


def wanted(environment: Mapping[str, str]) -> bool | None:
    """FORCE_CUDA: the kernels must be built, must not be, or (None) are where they can be."""
    value = environment.get("FORCE_CUDA", "").strip().lower()
    return value not in ("0", "off", "false", "no") if value else None


def plan_kernels(environment: Mapping[str, str]) -> Plan:
    """What to compile for what, or `LeftOut`."""
    forced = wanted(environment)
    if forced is False:
        raise LeftOut("FORCE_CUDA=0 is set", "unset it")
    if sys.platform != "linux":
        raise LeftOut(f"they are not made for {sys.platform}", "build on Linux")
    toolkit = find_toolkit(environment)
    _require_torch()
    asked = environment.get("TORCH_CUDA_ARCH_LIST")
    targets, remarks = architectures.choose(
        _native() if asked == "native" else asked, toolkit.known
    )
    for remark in remarks:
        print(f"grasp_kernels: {remark}")
    return Plan(toolkit, targets, bool(forced))


def _plan_or_message(environment: Mapping[str, str]) -> Plan | None:
    try:
        return plan_kernels(environment)
    except LeftOut as left:
        if wanted(environment):
            raise SystemExit(
                f"grasp_kernels: FORCE_CUDA asks for the CUDA kernels, but {left.reason}; "
                f"{left.remedy}."
            ) from None
        print(
            f"grasp_kernels: {left.reason}, the CUDA kernels are left out "
            f"({left.remedy} to have them)"
        )
        return None


def _require_torch() -> None:
    if find_spec("torch") is None:
        raise LeftOut(
            "torch is not installed where the build runs",
            "install torch, pybind11 and ninja and use pip install --no-build-isolation",
        )
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH:
        wanted_version = ".".join(map(str, TORCH))
        raise LeftOut(f"torch {torch.__version__} is too old", f"install torch {wanted_version}")
    if torch.version.hip is not None:
        raise LeftOut("this torch is made for ROCm", "install a torch for CUDA or CPU")


def _native() -> str:
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not found:
        raise LeftOut(
            "TORCH_CUDA_ARCH_LIST is native and torch sees no GPU", "name architectures in it"
        )
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def _kernels(plan: Plan) -> Extension:
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(plan.toolkit.home)  # a torch without CUDA looks for none
    # The library carries its own runtime and knows torch by its stable ABI alone, so it matters not
    # which CUDA torch was compiled with.
    cpp_extension._check_cuda_version = lambda *_: None
    code = [file for file in SOURCES.rglob("*.cpp") if CALL_SOURCES not in file.parents]
    files = [*SOURCES.glob("*.cu"), *code]
    common = [f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000", "-std=c++20"]
    flags = [flag for target in plan.targets for flag in target.flags]
    extension = cpp_extension.CUDAExtension(
        KERNELS,
        sorted(str(file) for file in files if file != HOST_SOURCE),
        include_dirs=[str(SOURCES.resolve()), *plan.toolkit.includes],
        library_dirs=plan.toolkit.libraries,
        depends=_headers(),
        py_limited_api=True,  # keeps torch_python away
        optional=True,
        extra_compile_args={
            "cxx": [*common, "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"],
            "nvcc": [*common, "-O3", "-Xptxas=-v", "-Xcompiler=-fvisibility=hidden", *flags],
        },
        # libtorch.so must be named although nothing of it is used: it leads to libtorch_cuda.so
        # where there is one, and some compilers drop what looks unused.
        extra_link_args=[
            "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed",
            "-lcudart_static", "-ldl", "-lrt", "-lpthread",
            "-Wl,--exclude-libs,ALL", "-Wl,-z,defs",
        ],
    )  # fmt: skip
    extension.libraries = []  # those of torch's CUDA build, which may not be there
    return extension


def _host() -> Extension:
    from pybind11.setup_helpers import Pybind11Extension

    return Pybind11Extension(
        HOST,
        [str(HOST_SOURCE)],
        include_dirs=[str(SOURCES.resolve())],
        depends=_headers(),
        cxx_std=17,
        optional=True,  # a failing compiler is a warning, not an error
    )


def _call() -> Extension:
    import torch
    from torch.utils import cpp_extension

    name = CALL + "_".join(torch.__version__.split(".")[:2])
    return Extension(
        name,
        sorted(str(file) for file in CALL_SOURCES.glob("*.cpp")),
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_python", "torch_cpu", "c10"],
        depends=_headers(),
        define_macros=[("GRASP_MODULE", name.rpartition(".")[2])],
        extra_compile_args=["-std=c++20", "-O2", "-g0", "-fvisibility=hidden"],
        language="c++",
        optional=True,
    )


def _headers() -> list[str]:
    return sorted(str(file) for end in ("h", "cuh") for file in SOURCES.rglob(f"*.{end}"))


def _command(plan: Plan | None, version: str) -> type[build_ext]:
    """The class of the command `build_ext`."""
    base: type[Any] = build_ext
    if plan is not None:
        _find_ninja()
        from torch.utils.cpp_extension import BuildExtension

        base = BuildExtension

    class Build(base):  # type: ignore[valid-type]
        built: Plan | None = None

        def finalize_options(self) -> None:
            super().finalize_options()
            if plan is not None:
                self.build_temp = str(OBJECTS)

        def get_ext_filename(self, name: str) -> str:
            if name.endswith(KERNELS.rpartition(".")[2]):  # one library for all versions of Python
                return f"{name.replace('.', os.sep)}.so"
            return str(super().get_ext_filename(name))

        def run(self) -> None:
            # Of an earlier build; it must not outlive its sources where this one leaves it out.
            for folder in (Path(self.build_lib), Path()):
                kernels = folder / self.get_ext_filename(KERNELS)
                calls = folder.glob(f"{CALL.replace('.', os.sep)}*")
                for library in (kernels, *calls) if folder != Path() or self.inplace else ():
                    library.unlink(missing_ok=True)
            super().run()

        def build_extension(self, extension: Extension) -> None:
            if extension.name == KERNELS:
                self._build_kernels(extension)
            elif extension.name.startswith(CALL):
                self._build_or_leave(extension, "the calls of layers do not compile")
            else:
                self._build_host(extension)

        def _build_kernels(self, extension: Extension) -> None:
            assert plan is not None
            names = ", ".join(map(str, plan.targets))
            print(f"grasp_kernels: compiling the CUDA kernels for {names}", flush=True)
            _forget_stale(Path(self.build_temp), extension)
            _record_with(plan.toolkit)
            try:
                super().build_extension(extension)
            except Exception as error:
                if plan.forced:
                    raise SystemExit(
                        "grasp_kernels: FORCE_CUDA asks for the CUDA kernels, but they do not "
                        f"compile ({error}); see the messages above."
                    ) from error
                print(
                    f"grasp_kernels: the CUDA kernels do not compile ({error}) and are left out; "
                    "see the messages above"
                )
            else:
                self.built = plan

        def _build_host(self, extension: Extension) -> None:
            folder = Path(self.build_temp).resolve()
            header = folder / HEADER
            _write_header(header, version, self.built, folder)
            extension.include_dirs.append(str(folder))
            extension.depends.append(str(header))
            self._build_or_leave(extension, "the module _host does not compile")

        def _build_or_leave(self, extension: Extension, what: str) -> None:
            try:
                super().build_extension(extension)
            except (CCompilerError, BaseError, RuntimeError) as error:  # the last is of ninja
                print(f"grasp_kernels: {what} ({error}), left out; see the messages above")

    return Build


def _find_ninja() -> None:
    """Makes the ninja that pip installed visible where its folder is not on the path."""
    if find_spec("ninja") is not None:
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


def _record_with(toolkit: Toolkit) -> None:
    """Makes torch's ninja file call nvcc through the recorder."""
    command = [sys.executable, str(Path(ptxas.__file__).resolve())]
    nvcc = os.environ.get("PYTORCH_NVCC") or shlex.quote(str(toolkit.nvcc))
    os.environ["PYTORCH_NVCC"] = f"{shlex.join(command)} {nvcc}"


def _objects(folder: Path, sources: list[str]) -> list[Path]:
    return [folder / Path(file).with_suffix(".o") for file in sources if file.endswith(".cu")]


def _forget_stale(folder: Path, extension: Extension) -> None:
    """Deletes objects older than a header: a torch without CUDA does not tell ninja of headers."""
    changed = max((Path(file).stat().st_mtime for file in extension.depends), default=0.0)
    for file in _objects(folder, extension.sources):
        if file.exists() and file.stat().st_mtime < changed:
            file.unlink()


def _write_header(header: Path, version: str, built: Plan | None, folder: Path) -> None:
    """What host.cpp reports; the file is left alone where it says so already."""
    names = [str(target) for target in built.targets] if built else []
    kernels = ptxas.read(_objects(folder, [str(file) for file in SOURCES.glob("*.cu")]))
    kernels = [kernel for kernel in kernels if kernel.architecture in names]
    kernels.sort(key=lambda k: (names.index(k.architecture), len(k.symbol), k.symbol))
    rows = [
        f'{{"{k.symbol}", "{k.architecture}", {k.registers}, {k.local_memory}, {k.spilled}, '
        f"{k.shared_memory}}}"
        for k in kernels
    ]
    lines = [
        "// Made by build_support/extensions.py.",
        f"#define GRASP_VERSION {json.dumps(version)}",
        f"#define GRASP_NVCC {json.dumps(built.toolkit.version if built else '')}",
        f'#define GRASP_TORCH_ABI "{".".join(map(str, TORCH))}"',
        f"#define GRASP_ARCHITECTURES {', '.join(map(json.dumps, names))}",
        "#define GRASP_KERNELS " + ", \\\n  ".join(rows),
    ]
    text = "\n".join(lines) + "\n"
    if not header.exists() or header.read_text(encoding="utf-8") != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text, encoding="utf-8")
