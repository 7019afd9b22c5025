"""The emulator that CUDA kernels are tested on does what the PTX ISA says, and refuses mistakes."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

EMULATOR = Path(__file__).parents[2] / "tools" / "emulator"
SEEDS = range(9)

Run = Callable[[str, int], str]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


def build(folder: Path, *flags: str) -> Run:
    library = folder / "emulator.so"
    include = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++20", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", "-Wall"]
    command += [
        "-Wno-psabi",
        "-Werror",
        *flags,
        f"-I{EMULATOR}",
        f"-I{include}",
        "-o",
        str(library),
    ]
    done = subprocess.run(
        [*command, *map(str, EMULATOR.glob("*.cpp"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(library)).grasp_emulator_selftest
    function.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    function.restype = ctypes.c_char_p
    return lambda name, seed: function(name.encode(), seed).decode()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build(tmp_path_factory.mktemp("emulator"))


CORRECT = [
    "copies",
    "exchange",
    "exited_threads_leave_the_cluster",
    "mma_bf16",
    "mma_fp16",
    "registers",
    "ring",
    "wgmma_bf16",
    "wgmma_fp16",
]


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_kernel_is_right_in_every_order(run: Run, name: str) -> None:
    assert {seed: run(name, seed) for seed in SEEDS} == dict.fromkeys(SEEDS, "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("counts_differ", r"named barrier 1 is used for \d+ and for \d+ threads"),
        ("divergence", "divergence: one lane is at .*, another of its warp at"),
        ("ended_lanes", "divergence: .* ended"),
        ("many_arrivals", r"more arrivals at an mbarrier .*thread 0 of block \("),
        ("many_registers", r"deadlock: \d+ threads at take_registers\(240\)"),
        ("map_of_odd_rows", "misaligned address: rows of a tensor map"),
        ("misaligned", "misaligned address: byte 8 of shared memory"),
        ("missing_barrier", r"deadlock: 32 threads at named_barrier\(1, 64\)"),
        ("much_shared_memory", "more shared memory than there is"),
        ("never_arrives", r"deadlock: 1 threads at barrier_wait\(0, 0\)"),
        ("no_init", "no mbarrier is initialised at byte 0"),
        ("outside", "outside of the shared memory of 1024 bytes"),
        ("registers_of_one_warp", "divergence: not all four warps of a group"),
        ("ring_of_too_few_bytes", "an mbarrier got 128 bytes more than it expects"),
        ("ring_of_too_many_arrivals", "deadlock: "),
        ("ring_of_too_many_bytes", "deadlock: "),
        ("wgmma_of_three_warps", "divergence: the warps of a group"),
        ("wgmma_without_fence", "wgmma before the first wgmma_fence"),
        ("wgmma_without_wait", "wrong: element 0 is -?nan"),
        ("written_outside", "wrote outside of its shared memory"),
    ],
)
def test_a_mistake_is_named_and_forgotten(run: Run, name: str, message: str) -> None:
    for seed in SEEDS:
        assert re.search(message, run(name, seed)), (seed, run(name, seed))
        assert run("ring", seed) == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("copies_without_wait", "wrong: element 0 is -?nan"),
        ("exchange_without_stay", "after the block has ended"),
        ("wgmma_reused_early", "wrong: element"),
        ("wgmma_without_barrier", "wrong: element"),
    ],
)
def test_a_race_is_lost_under_some_seed(run: Run, name: str, message: str) -> None:
    found = [run(name, seed) for seed in SEEDS]
    assert any(re.search(message, text) for text in found), found


@pytest.mark.parametrize("name", ["copies_without_wait", "wgmma_reused_early"])
def test_odd_seeds_do_asynchronous_work_late(run: Run, name: str) -> None:
    assert run(name, 0) == ""
    assert all(run(name, seed) for seed in SEEDS if seed % 2 == 1)


def test_a_seed_settles_the_order(run: Run) -> None:
    for seed in SEEDS:
        assert run("wgmma_without_barrier", seed) == run("wgmma_without_barrier", seed)


def test_threads_of_the_host_take_turns(run: Run) -> None:
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda seed: run("ring", seed), range(32))) == {""}


def test_the_portable_switch_of_stacks(tmp_path: Path) -> None:
    run = build(tmp_path, "-DGRASP_EMULATOR_UCONTEXT")
    assert {run(name, seed) for name in CORRECT for seed in (0, 1)} == {""}
    assert run("divergence", 0).startswith("emulator: divergence")
