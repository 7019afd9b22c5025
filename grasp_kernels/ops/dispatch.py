"""Choose the backend of an operator, or say why one cannot run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from torch import device


@cache
def load(package: str, name: str) -> ModuleType | str:
    """The module of a backend, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        return f"{str(error.name).split('.')[0]} is not installed"
    except ImportError as error:  # an old release of a package that is there
        return f"{error.name} is too old for it ({error.msg})"


def why_not(package: str, name: str, where: device) -> str | None:
    """None when the backend can run on that device, else the reason."""
    module = load(package, name)
    return module if isinstance(module, str) else module.unsupported(where)


def select(
    package: str, order: Sequence[str], requested: str, where: device, *call: Any
) -> ModuleType:
    """The backend to run: the first of `order` that can, or exactly the requested one.

    An explicit request never falls back: it runs, or raises with the reason. A backend that cannot
    compute every call has `refuses(*call)`, which says why not.
    """
    if requested not in ("auto", *order):
        raise ValueError(f"backend {requested!r} is unknown; use 'auto' or one of {tuple(order)}.")
    reason: str | None = None
    for name in order if requested == "auto" else (requested,):
        module = load(package, name)
        if isinstance(module, str):
            reason = module
            continue
        reason = module.unsupported(where)
        if reason is None and call:
            reason = module.refuses(*call)
        if reason is None:
            return module
    raise ValueError(
        f"backend {requested!r} cannot run on {where}: {reason}; "
        "use backend='auto' for one that can."
    )
