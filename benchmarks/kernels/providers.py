"""The registry of what is compared, by name.

Our backends come from the tuple of the operator, so that a new one is timed without a word here.
"""

from __future__ import annotations

from benchmarks.kernels.orderings import ORDERINGS
from benchmarks.kernels.ours import our_providers
from benchmarks.kernels.peft_providers import PEFT_PROVIDERS
from benchmarks.kernels.provider import Provider

PROVIDERS: dict[str, Provider] = {**PEFT_PROVIDERS, **ORDERINGS, **our_providers()}
LEVELS = ("linear", "layer", "step")


def at_level(level: str) -> dict[str, Provider]:
    """The providers that exist for single linears, or for whole layers and steps."""
    return {
        name: provider
        for name, provider in PROVIDERS.items()
        if level == "linear" or provider.adapt is not None
    }


def choose(names: tuple[str, ...], level: str) -> tuple[str, ...]:
    """Names in the order of the registry; none given: the usual ones, "all": all of the level.

    Raises:
        ValueError: a name is unknown, or does not exist at that level.
    """
    known = at_level(level)
    for name in set(names) - {"all"}:
        if name not in PROVIDERS:
            raise ValueError(
                f"providers is {name!r}, which is unknown; use some of {sorted(PROVIDERS)}."
            )
        if name not in known:
            raise ValueError(
                f"providers is {name!r}, which exists for single linears only; leave it out or use "
                "--level linear."
            )

    def wanted(name: str) -> bool:
        return bool({name, "all"} & set(names)) or (not names and PROVIDERS[name].by_default)

    return tuple(name for name in known if wanted(name))
