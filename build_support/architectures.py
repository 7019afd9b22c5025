"""TORCH_CUDA_ARCH_LIST, or what stands for it, as flags of nvcc."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from build_support import LeftOut

# PTX for 8.0 is what newer GPUs compile for themselves. Machine code for x.0 runs on x.1 to x.9.
DEFAULT = "8.0+PTX;9.0a;10.0;12.0"
OLDEST = 80  # cp.async and products of bfloat16
# The names that torch knows, of GPUs that are new enough.
NAMED = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


@dataclass(frozen=True)
class Target:
    """Machine code for one generation of GPUs, and on request PTX for those after it."""

    number: int
    suffix: str  # "a" or "f", the code for this generation or family alone
    ptx: bool

    def __str__(self) -> str:
        return f"sm_{self.number}{self.suffix}"

    @property
    def flags(self) -> list[str]:
        name = f"{self.number}{self.suffix}"
        made = [f"-gencode=arch=compute_{name},code=sm_{name}"]
        if self.ptx:  # of the plain architecture: PTX for 90a runs nowhere else
            made.append(f"-gencode=arch=compute_{self.number},code=compute_{self.number}")
        return made


def choose(asked: str | None, known: Collection[str]) -> tuple[list[Target], list[str]]:
    """What to compile for, and remarks about what was asked for and is not done.

    `asked` is TORCH_CUDA_ARCH_LIST; without one the default is taken. `known` are the names of
    machine code that nvcc lists, such as sm_80.
    """
    targets: dict[str, Target] = {}
    remarks = []
    for word in _words(asked or DEFAULT):
        target = _parse(word)
        if target.number < OLDEST:
            remarks.append(f"{word} is left out, the CUDA kernels need 8.0 or newer")
            continue
        if f"sm_{target.number}" not in known:
            remarks.append(f"{word} is left out, this nvcc does not know it")
            continue
        if target.number == 90 and not target.suffix:
            target = Target(90, "a", target.ptx)
            remarks.append(f"{word} is compiled as 9.0a, which has the instructions of Hopper")
        before = targets.get(str(target))
        ptx = target.ptx or (before is not None and before.ptx)
        targets[str(target)] = Target(target.number, target.suffix, ptx)
    if not targets:
        raise LeftOut(
            f"nothing is left of the architectures {asked or DEFAULT}",
            "set TORCH_CUDA_ARCH_LIST to some that nvcc knows, 8.0 or newer",
        )
    return list(targets.values()), remarks


def _words(asked: str) -> list[str]:
    for name, numbers in NAMED.items():
        asked = asked.replace(name, numbers)
    return [word for word in re.split(r"[;,\s]+", asked) if word]


def _parse(word: str) -> Target:
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
    if found is None:
        raise SystemExit(
            f"grasp_kernels: TORCH_CUDA_ARCH_LIST has {word!r}, which is no architecture; "
            "write numbers such as 8.0;9.0a;12.0+PTX."
        )
    major, minor, suffix, ptx = found.groups()
    return Target(10 * int(major) + int(minor), suffix, ptx is not None)
