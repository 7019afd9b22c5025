"""Every test starts from the same seed, uninitialised memory is NaN, and the hub is not asked.

Without a network, a test that names a checkpoint that is not there waited 24 s for the hub.
Without a GPU, Triton's kernels run in its interpreter, which must be said before it is imported,
and the CUDA kernels on the emulator of tools/emulator.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from grasp_kernels.ops.lora_linear.registry import KERNELS
from tools import emulator

pytest.register_assert_rewrite("tests.helpers")
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores
    torch.set_num_threads(1)


def pytest_collection() -> None:
    """Before the tests ask which backends there are."""
    emulator.load()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels without a GPU are slow: in Triton's interpreter, on the emulator."""
    for item in items:
        call = getattr(item, "callspec", None)
        given = [value for value in call.params.values() if isinstance(value, str)] if call else []
        if not torch.cuda.is_available() and not set(KERNELS).isdisjoint(given):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch fills what `empty` returns with NaN while deterministic algorithms are asked for."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
