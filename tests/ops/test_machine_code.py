"""The machine code of the CUDA kernels, as this tree's build left it: no GPU is needed to read it.

Every kernel has the instructions that it was written for and keeps its numbers in registers.
"""

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import triton

from build_support import extensions
from tests.helpers.nvcc import needs_nvcc

pytestmark = [pytest.mark.slow, needs_nvcc]
OBJECTS = Path(__file__).parents[2] / extensions.OBJECTS / "csrc"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
PASSES = ("gradient", "input", "down")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
HOPPER = "sm_90a"
# Products and copies of a tile by the generation whose kernels a part runs.
INTENDED = {
    HOPPER: {"HGMMA", "UTMALDG", "SYNCS", "USETMAXREG"},
    "sm_80": {"HMMA", "LDGSTS", "LDSM"},
}
LOCAL_MEMORY = {"LDL", "STL"}


@cache
def kernels(name: str) -> dict[tuple[str, str], Counter[str]]:
    """How often each instruction stands in each kernel of an object, by architecture and symbol."""
    done = subprocess.run(
        [CUOBJDUMP, "--dump-sass", OBJECTS / f"{name}.o"],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[tuple[str, str], Counter[str]] = {}
    for part in re.split(r"\n\s*arch = ", done.stdout)[1:]:
        arch = part.split()[0]
        for text in part.split("Function : ")[1:]:
            words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_]+)", text)
            found[arch, text.split()[0]] = Counter(words)
    return found


def is_made_here(code: Counter[str]) -> bool:
    """Kernels of the other generation are there by name only: they stop."""
    return sum(code.values()) > 100


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", PASSES)
def test_products_and_copies_are_those_of_the_part(name: str, arch: str) -> None:
    made = [code for (a, _), code in kernels(name).items() if a == arch and is_made_here(code)]
    shapes = {"gradient": (3, 3), "input": (5, 5), "down": (5, 5)}[name][arch == HOPPER]
    assert len(made) == 2 * shapes  # bfloat16 and float16
    intended = INTENDED[HOPPER if arch == HOPPER else "sm_80"]
    others = (INTENDED["sm_80"] | INTENDED[HOPPER]) - intended - {"SYNCS"}
    for code in made:
        assert intended <= set(code)
        assert not others & set(code)


@pytest.mark.parametrize("name", [*PASSES, "finish"])
def test_nothing_lies_in_local_memory(name: str) -> None:
    found = kernels(name)
    assert {arch for arch, _ in found} == set(ARCHITECTURES)
    for key, code in found.items():
        assert not LOCAL_MEMORY & set(code), key


def test_no_sum_is_made_by_atomics() -> None:
    """Their order changes from run to run. Barriers in shared memory count by SYNCS."""
    for name in (*PASSES, "finish"):
        for key, code in kernels(name).items():
            assert not [word for word in code if word.startswith(("ATOM", "RED"))], key
