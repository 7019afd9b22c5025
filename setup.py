"""Builds the optional extension; all metadata stands in pyproject.toml.

Where nothing can be compiled the package installs as pure Python.
"""

import runpy
from pathlib import Path

from setuptools import setup

try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ModuleNotFoundError:  # installed with --no-build-isolation and without pybind11
    print("grasp_kernels: pybind11 is not installed, the extension is left out")
    extensions, commands = [], {}
else:
    version = runpy.run_path(str(Path(__file__).parent / "grasp_kernels" / "version.py"))
    extensions = [
        Pybind11Extension(
            "grasp_kernels._host",
            ["csrc/host.cpp"],
            define_macros=[("GRASP_VERSION", f'"{version["__version__"]}"')],
            cxx_std=17,
            optional=True,  # a failing compiler is a warning, not an error
        )
    ]
    commands = {"build_ext": build_ext}

setup(ext_modules=extensions, cmdclass=commands)
