"""A file, or a data set on the Hugging Face hub -> its rows, each with its place."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = Iterator[tuple[str, Any]]  # ("data.jsonl, line 3", {"messages": [...]})

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_JSON = ("expected one JSON object per line", "expected a JSON array of objects")


def read_rows(source: str | Path, *, split: str, subset: str | None) -> Rows:
    """The rows of a file (JSON lines, a JSON array, CSV or parquet) or of a data set on the hub.

    Raises:
        FileNotFoundError: neither a file nor a data set that can be fetched.
        ImportError: parquet without pyarrow, a data set without datasets.
        ValueError: the file is not what its name or its beginning says, with the place.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if path.is_file():
        return (reader or _json)(path)
    if reader is None and not path.exists() and _HUB_NAME.fullmatch(str(source)):
        return _hub(str(source), split, subset)
    raise FileNotFoundError(
        f"There is no file {path}: give a file with chat data (JSONL, JSON, CSV or parquet), or "
        'the name of a data set on the Hugging Face hub ("owner/name").'
    )


def _json(path: Path) -> Rows:
    with path.open("rb") as lines:
        start = lines.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        lines.seek(0)
        if start.startswith(b"["):
            yield from _numbered(path, _parse(lines.read(), str(path), _JSON[1]))
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _parse(line, place, _JSON[0])


def _parse(content: bytes, place: str, expected: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: byte {error.start} is not UTF-8, expected a file in UTF-8."
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}), {expected}.") from None


def _csv(path: Path) -> Rows:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for place, row in _numbered(path, csv.DictReader(lines, strict=True)):
                # None is the key of fields beyond the header, and the value of missing ones.
                yield place, _without_nulls({k: v for k, v in row.items() if k is not None})
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not CSV in UTF-8 ({error}): export it again.") from None


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ImportError(
            f"{path} is a parquet file, which needs the package pyarrow: pip install pyarrow, or "
            "give the data as JSONL."
        ) from None
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (_without_nulls(row) for batch in batches for row in batch.to_pylist())
        yield from _numbered(path, rows)
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path}: not parquet ({_first_line(error)}): fetch the file again."
        ) from None


def _hub(name: str, split: str, subset: str | None) -> Rows:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ImportError(
            f"There is no file {name}, and a data set on the Hugging Face hub needs the package "
            "datasets: pip install datasets, or give a file."
        ) from None
    try:
        rows = load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        raise FileNotFoundError(
            f"There is no file {name}, and no data set of this name with the subset {subset!r} and "
            f"the split {split!r} can be fetched from the Hugging Face hub "
            f"({_first_line(error).rstrip('.')}): check the names, or give a file."
        ) from None
    return _numbered(name, map(_without_nulls, rows))


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _numbered(source: object, rows: Any) -> Rows:
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


def _without_nulls(value: Any) -> Any:
    """Tables give every row all keys; what a row does not have is null there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
