"""What the header of a subspace file must be, which somebody else may have written."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from os import PathLike, fspath
from typing import Any

from grasp_kernels.inert import shown

_Check = Callable[[Any], bool]


def current(header: Any, path: str | PathLike[str]) -> Any:
    """A header in the format that is written now, 4.

    Up to 3 there were bases of layers that read the stream (`side`) beside those of layers that
    write to it, up to 2 also bases of their own for each layer (`scope`), and 1 had a verdict.

    Raises:
        ValueError: the subspace is of layers that read the stream, or differs from layer to layer.
    """
    if not isinstance(header, dict):
        return header
    for name, kept in (("side", "write"), ("scope", "shared")):
        if header.get(name, kept) != kept:
            raise ValueError(
                f"{fspath(path)!r} holds a subspace of an older form ({name} is "
                f"{shown(header[name])}), which is no longer used; identify it anew with "
                "`grasp-kernels identify`."
            )
    return {"bases": header["write"], **header} if "write" in header else header


def header_fault(header: Any, tensors: Collection[str]) -> str | None:
    """What is wrong with a header, given the names of the tensors beside it; None if nothing is."""
    if not isinstance(header, dict):
        return "its header is no JSON object"
    keys = _object_of(lambda value: isinstance(value, str) and value in tensors)
    forms: dict[str, _Check] = {
        "version": _is_count,
        "bases": keys,
        "stream": lambda value: value is None or (isinstance(value, str) and value in tensors),
        "k": _is_count,
        "reasons": _list_of(lambda value: isinstance(value, str)),
        "evidence": _is_evidence,
        "metadata": lambda value: isinstance(value, dict),
    }
    for name, fits in forms.items():
        if name not in header:
            return f"its header has no {name}"
        if not fits(header[name]):
            return f"{name} is {shown(header[name])}"
    if header["metadata"].get("model_type") is not None and not isinstance(
        header["metadata"]["model_type"], str
    ):
        return f"model_type is {shown(header['metadata']['model_type'])}"
    used = {*header["bases"].values(), header["stream"]}
    left = sorted(set(tensors) - used)
    return f"nothing refers to its tensor {shown(left[0])}" if left else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(fits: _Check, least: int = 0) -> _Check:
    return lambda value: (
        isinstance(value, list) and len(value) >= least and all(fits(one) for one in value)
    )


def _object_of(fits: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(fits(one) for one in value.values())


def _record_of(fields: dict[str, _Check]) -> _Check:
    return lambda value: (
        isinstance(value, dict) and all(fits(value.get(name)) for name, fits in fields.items())
    )


_numbers = _list_of(_is_number, least=1)
# What the summary and the picture of a subspace show.
_RECORDS: dict[str, _Check] = {
    "spectra": _record_of(
        {
            "k": _is_count,
            "gap": _is_number,
            "singular_values": _numbers,
            "null": _numbers,
        }
    ),
    "agreement": _record_of(
        {
            "layers": _list_of(_is_count),
            "values": _numbers,
            "chance": _is_number,
        }
    ),
}


def _is_evidence(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _list_of(fits)(value.get(name, [])) for name, fits in _RECORDS.items()
    )
