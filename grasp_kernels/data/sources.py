"""A file, or a data set on the Hugging Face hub -> its rows, each with its place."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grasp_kernels.inert import reason

Rows = Iterator[tuple[str, Any]]  # ("data.jsonl, line 3", {"messages": [...]})

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_JSON = ("expected one JSON object per line", "expected a JSON array of objects")
_BEGINS_AS_JSON = re.compile(rb'\{\s*["}]|\[\s*[\[{"\]]')  # whole or not
_PLAIN = ("", ".txt")  # endings of plain text


def read_rows(source: str | Path, *, split: str, subset: str | None) -> Rows:
    """Read the rows of a file (JSON lines or array, CSV, parquet) or of a data set on the hub.

    Raises:
        FileNotFoundError: neither a file nor a data set that can be fetched.
        ImportError: parquet without pyarrow, a data set without datasets.
        ValueError: the file is not what its name or its beginning says, with the place.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if path.is_file():
        rows = (reader or _json)(path)
    elif reader is None and not path.exists() and _HUB_NAME.fullmatch(str(source)):
        rows = _hub(str(source), split, subset)
    else:
        raise FileNotFoundError(
            f"There is no file {path}: give a file with chat data (JSONL, JSON, CSV or parquet), "
            'or the name of a data set on the Hugging Face hub ("owner/name").'
        )
    return ((place, _without_nulls(row)) for place, row in rows)


def has_records(path: Path) -> bool:
    """Say whether a file has records by its name or its beginning, and not plain lines.

    Raises:
        ValueError: neither the name nor the beginning says it.
    """
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.suffix.lower() in _READERS or _BEGINS_AS_JSON.match(content):
        return True
    if path.suffix.lower() not in _PLAIN:
        raise ValueError(
            f"{path}: a file that ends in {path.suffix} is not read, expected a prompt on each "
            "line of a .txt file, or JSONL, JSON, CSV or parquet."
        )
    return False


def decode(content: bytes, place: str) -> str:
    """Decode a file, or a part of it.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: byte {error.start} is not UTF-8: save it in UTF-8.") from None


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or says something twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(reason(error)) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'"{twice}" appears twice in one object')
    return value


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
    text = decode(content, place)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}), {expected}.") from None


def _csv(path: Path) -> Rows:
    before = csv.field_size_limit(2**31 - 1)  # an answer may be longer than Python's 131072
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            header, rows, line = list(reader.fieldnames or ()), list[Any](), reader.line_num
            for row in reader:
                rows.append(row)
                line = reader.line_num
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not CSV in UTF-8 ({error}): export it again.") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {line + 1}: not CSV ({error}): export it again.") from None
    finally:
        csv.field_size_limit(before)
    _refuse_twice(path, [name for name in header if name])
    for place, row in _numbered(path, rows):
        more = row.pop(None, [])
        if any(more):
            raise ValueError(
                f"{place}: {len(header) + len(more)} fields, but the header has {len(header)}: "
                "quote every field that contains a comma."
            )
        # CSV has no null: a missing value of a row is an empty field.
        yield place, {name: field for name, field in row.items() if field}


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ImportError(
            f"{path} is a parquet file, which needs the package pyarrow: run pip install pyarrow, "
            "or give the data as JSONL."
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _refuse_twice(path, file.schema_arrow.names)
        batches = file.iter_batches()
        yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a complete parquet file ({reason(error)}): download it again."
        ) from None


def _refuse_twice(path: Path, names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f'{path}: the column "{twice[0]}" appears twice: rename one of them.')


def _hub(name: str, split: str, subset: str | None) -> Rows:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ImportError(
            f"There is no file {name}, and a data set on the Hugging Face hub needs the package "
            "datasets: run pip install datasets, or give a file."
        ) from None
    try:
        rows = load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        raise FileNotFoundError(
            f"There is no file {name}, and no data set of this name with the subset {subset!r} and "
            f"the split {split!r} can be fetched from the Hugging Face hub "
            f"({reason(error)}): check the names, or give a file."
        ) from None
    return _numbered(name, rows)


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _numbered(source: object, rows: Any) -> Rows:
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


def _without_nulls(value: Any) -> Any:
    """Remove null and NaN, the missing values of a row in a table with all keys."""
    if isinstance(value, dict):
        there = {key: _without_nulls(item) for key, item in value.items()}
        return {key: item for key, item in there.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
