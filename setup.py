"""Builds the optional native parts; all metadata stands in pyproject.toml.

Where nothing can be compiled the package installs as pure Python.
"""

import runpy
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # build tools run this file without its folder on the path

from build_support.extensions import setup_arguments  # noqa: E402

version = runpy.run_path(str(ROOT / "grasp_kernels" / "version.py"))["__version__"]
setup(**setup_arguments(version))
