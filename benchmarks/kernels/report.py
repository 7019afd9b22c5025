"""Tables made from rows, in Markdown.

Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.kernels.rows import Row
from benchmarks.kernels.shapes import LINEARS

_ALL = "all"  # the sum over the linears of a layer
_UNTIMED = {"unavailable": "n/a", "wrong": "wrong", "failed": "failed"}
_MACHINE = ("device", "driver", "threads", "torch", "triton", "peft", "commit")


@dataclass(frozen=True)
class Name:
    """What a line of a table is about."""

    level: str
    model: str
    part: str  # a linear, "all", or what a layer or a step is called
    dtype: str
    T: int
    R: int
    Q: int
    shape: str
    machine: tuple[object, ...]


@dataclass(frozen=True)
class Entry:
    """One provider in one line: milliseconds, None where not timed, and what the floor counts."""

    refusal: str | None
    forward: float | None
    backward: float | None
    both: float | None
    floor_ms: float
    flops: float
    extra_bytes: float
    peak_memory: int | None


Lines = dict[Name, dict[str, Entry]]


def lines_of(rows: list[Row]) -> Lines:
    """Every case of the rows, and after them the sums over the linears of a layer.

    A sum is given for a provider when all seven linears were timed for it.
    """
    lines: Lines = {}
    for row in rows:
        lines.setdefault(_name(row), {})[row["provider"]] = _entry(row)
    return lines | _sums(lines)


def _name(row: Row) -> Name:
    part = row["linear"]
    if part is None:
        part = row["level"] if row["level"] == "layer" else f"step, {row['layers']} layers"
        part += ", checkpointing" if row["checkpointing"] else ""
    shape = "" if row["K"] is None else f"{row['K']}→{row['N']}"
    machine = tuple(row[field] for field in _MACHINE)
    same = {field: row[field] for field in ("level", "model", "dtype", "T", "R", "Q")}
    return Name(**same, part=part, shape=shape, machine=machine)


def _entry(row: Row) -> Entry:
    both = {field: row[field]["both"] for field in ("floor_ms", "flops", "extra_bytes")}
    medians = {part: row[part]["median"] for part in ("forward", "backward", "both")}
    return Entry(row["refusal"], **medians, **both, peak_memory=row["peak_memory"])


def _sums(lines: Lines) -> Lines:
    by_layer: dict[Name, dict[str, dict[str, Entry]]] = {}
    for name, entries in lines.items():
        if name.level == "linear":
            providers = by_layer.setdefault(replace(name, part=_ALL, shape=""), {})
            for provider, entry in entries.items():
                providers.setdefault(provider, {})[name.part] = entry
    sums: Lines = {}
    for name, providers in by_layer.items():
        complete = {
            provider: _sum(list(parts.values()))
            for provider, parts in providers.items()
            if parts.keys() == set(LINEARS) and all(e.both is not None for e in parts.values())
        }
        if complete:
            sums[name] = complete
    return sums


def _sum(entries: list[Entry]) -> Entry:
    def over(field: str) -> float:
        return sum(getattr(entry, field) for entry in entries)

    peaks = [entry.peak_memory for entry in entries if entry.peak_memory is not None]
    return Entry(
        None,
        over("forward"),
        over("backward"),
        over("both"),
        over("floor_ms"),
        over("flops"),
        over("extra_bytes"),
        max(peaks) if peaks else None,
    )


def table(rows: list[Row], details: bool = False) -> str:
    """Milliseconds of every case, then all measures of the sums (with `details`: of every case)."""
    if not rows:
        return "There are no rows."
    lines = lines_of(rows)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    shown = {
        name: entries for name, entries in lines.items() if details or name.part not in LINEARS
    }
    parts = [
        "\n".join(_overview(lines, providers)),
        "Milliseconds, forward + backward, median (ratio to peft).",
    ]
    if shown:
        parts += ["\n".join(_measures(shown)), _LEGEND]
    parts += [*_refusals(rows), *_machines(rows)]
    return "\n\n".join(parts)


def _overview(lines: Lines, providers: list[str]) -> Iterator[str]:
    yield "| model | linear | dtype | T | R | Q | K→N | " + " | ".join(providers) + " |"
    yield "|---|---|---|---|---|---|---|" + "---|" * len(providers)
    for name, entries in lines.items():
        cells = [_cell(entries.get(provider), entries.get("peft")) for provider in providers]
        yield f"| {_start(name)} | {name.shape} | " + " | ".join(cells) + " |"


def _start(name: Name) -> str:
    part = name.part if name.part in LINEARS else f"**{name.part}**"
    return " | ".join(map(str, (name.model, part, name.dtype, name.T, name.R, name.Q)))


def _cell(entry: Entry | None, stock: Entry | None) -> str:
    if entry is None:
        return "–"
    if entry.both is None:
        return _UNTIMED[entry.refusal or "failed"]
    ratio = _ratio(entry.both, stock.both if stock else None)
    return f"{entry.both:.2f}" + (f" ({ratio})" if ratio else "")


def _ratio(value: float, of: float | None) -> str:
    return f"{value / of:.2f}" if of else ""


_LEGEND = (
    "Medians; /peft, /frozen, /floor: ratios of forward + backward. Floor: products of the frozen "
    "weights at the measured peak rate + X and dY read once more at the measured bandwidth. "
    "TFLOP/s: operations that the method needs / time. Extra GB/s: the floor's extra bytes / time "
    "beyond the frozen layer. MiB: peak beyond what was allocated before; largest of a sum's."
)


_MEASURES = (
    *("provider", "forward", "backward", "both", "/peft", "/frozen", "/floor"),
    *("TFLOP/s", "extra GB/s", "MiB"),
)


def _measures(lines: Lines) -> Iterator[str]:
    yield "| model | linear | dtype | T | R | Q | " + " | ".join(_MEASURES) + " |"
    yield "|---" * (6 + len(_MEASURES)) + "|"
    for name, entries in lines.items():
        for provider, entry in entries.items():
            cells = measures(entry, entries.get("peft"), entries.get("frozen"))
            yield f"| {_start(name)} | {provider} | " + " | ".join(cells) + " |"


def measures(entry: Entry, stock: Entry | None, frozen: Entry | None) -> list[str]:
    """The cells of one provider: times, ratios, achieved rates, memory."""
    if entry.both is None:
        return [_UNTIMED[entry.refusal or "failed"], *[""] * 8]
    frozen_ms = frozen.both if frozen else None
    beyond = None if frozen_ms is None else entry.both - frozen_ms
    extra = ""
    if beyond is not None and beyond > 0:
        extra = f"{entry.extra_bytes / (beyond * 1e-3) / 1e9:.1f}"
    return [
        *(f"{value or 0:.2f}" for value in (entry.forward, entry.backward, entry.both)),
        _ratio(entry.both, stock.both if stock else None),
        _ratio(entry.both, frozen_ms),
        _ratio(entry.both, entry.floor_ms),
        f"{entry.flops / (entry.both * 1e-3) / 1e12:.3g}",
        extra,
        "" if entry.peak_memory is None else f"{entry.peak_memory / 2**20:.0f}",
    ]


def _refusals(rows: list[Row]) -> list[str]:
    """Each reason once."""
    reasons = dict.fromkeys(
        f"- {row['provider']} {row['refusal']}: {row['refused']}"
        for row in rows
        if row["refused"] is not None
    )
    return ["\n".join(reasons)] if reasons else []


def _machines(rows: list[Row]) -> list[str]:
    """Each machine and version once."""
    notes: dict[str, None] = {}
    for row in rows:
        known = {field: row[field] for field in _MACHINE if row[field] is not None}
        notes[", ".join(f"{field} {value}" for field, value in known.items()) + "."] = None
    return ["\n".join(notes)]
