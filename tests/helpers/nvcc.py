"""Whether the CUDA kernels can be compiled here."""

import os

import pytest

from build_support import LeftOut, extensions


def has_nvcc() -> bool:
    try:
        extensions.plan_kernels(os.environ)
    except LeftOut:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")
