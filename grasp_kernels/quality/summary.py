"""Rows of every dish -> the comparison that matters: what a user has, ours, the best of the rest.

The best of the others is chosen by its scores on the reported seeds themselves, among all of them
and all strengths that are reported: it has an advantage that ours has not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from grasp_kernels.quality.harness import Row, best
from grasp_kernels.quality.methods import METHODS, Method
from grasp_kernels.quality.statistics import estimate, paired

OURS = "all-three"
# Twice what strengths are tuned with: at 0.01, KL on own text would be out on `slant` by .004, and
# the best of what remains has twenty times its drift.
_TOLERANCE = 0.02
_SOME_DRIFT = 0.05  # naive; with less there is nothing that a method could have taken away
_SCORES = (
    ("task", "task ↑"),
    ("drift", "drift ↓"),
    ("conditional", "drift, trained cues ↓"),
    ("good_cue", "good cue ↑"),
    ("facts", "facts ↑"),
)
_LEGEND = """\
Reads, projection and anchor together, beside the best of what others do: the least drift among
methods whose task is at most 0.02 below the naive fine-tune's, chosen on the very seeds that are
reported. "With more" also sees benign answers to other prompts. The projection alone is GRASP as
its abstract reads, with our side and layers; with directions from labels it was meant as an upper
bound and is none. Means over seeds; Δ are differences within seeds, with 95 % t intervals."""

_Key = tuple[str, Any]
Groups = Mapping[_Key, Sequence[Row]]


def summary(dishes: Mapping[tuple[str, str], Sequence[Row]]) -> list[str]:
    """Paragraphs of Markdown: a legend and one table over (dish, size) -> rows."""
    header = ["dish", "", "method", "seeds", *(title for _, title in _SCORES)]
    header += ["× less drift", "Δ task, naive", "Δ drift, best of the others"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for (dish, size), rows in dishes.items():
        name = f"{dish}, {size}"
        for cells in _lines(by_method(row for row in rows if not row["failure"])):
            lines.append("| " + " | ".join([name, *cells]) + " |")
            name = ""
    return [_LEGEND, "\n".join(lines)]


def by_method(rows: Iterable[Row]) -> dict[_Key, list[Row]]:
    groups: dict[_Key, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["strength"]), []).append(row)
    return groups


def by_seed(rows: Iterable[Row], part: str) -> dict[int, float]:
    return {row["seed"]: row[part] for row in rows}


def _lines(groups: Groups) -> list[list[str]]:
    """The cells of one dish, without its name."""
    if ("naive", None) not in groups:
        return []
    others = _best(groups, lambda m: m.origin == "others" and m.information == "none")
    lines = [
        ("naive", ("naive", None)),
        ("best of the others", others),
        (
            "with more",
            _best(groups, lambda m: m.information in ("off-topic prompts", "benign answers")),
        ),
        ("projection alone", _best(groups, lambda m: m.name == "grasp-k")),
        ("projection, labels", _best(groups, lambda m: m.name == "supervised")),
        ("**ours**", _best(groups, lambda m: m.name == OURS)),
    ]
    return [_cells(what, key, groups, others) for what, key in lines if key is not None]


def _best(groups: Groups, belongs: Callable[[Method], bool]) -> _Key | None:
    """The best method of a kind, by differences to the naive fine-tune within seeds."""
    differences: dict[_Key, tuple[float, float]] = {}
    for key, rows in groups.items():
        if key[0] == "naive" or key[0] not in METHODS or not belongs(METHODS[key[0]]):
            continue
        compared = [_difference(rows, groups["naive", None], part) for part in ("task", "drift")]
        if compared[0] is not None and compared[1] is not None:
            differences[key] = (compared[0].mean, compared[1].mean)
    return best(differences, 0.0, _TOLERANCE) if differences else None


def _cells(what: str, key: _Key, groups: Groups, others: _Key | None) -> list[str]:
    name, strength = key
    rows, naive = groups[key], groups["naive", None]
    cells = [what, name if strength is None else f"{name} {strength}", str(len(rows))]
    cells += [f"{estimate([row[part] for row in rows]).mean:.3f}" for part, _ in _SCORES]
    cells.append(_times_less(rows, naive))
    cells.append("" if name == "naive" else _signed(_difference(rows, naive, "task")))
    if others is None or key == others:
        cells.append("")
    else:
        cells.append(_signed(_difference(rows, groups[others], "drift")))
    return cells


def _difference(rows: Sequence[Row], reference: Sequence[Row], part: str) -> Any:
    return paired(by_seed(rows, part), by_seed(reference, part))


def _times_less(rows: Sequence[Row], naive: Sequence[Row]) -> str:
    """Naive drift over this drift, on the seeds of both; empty where there is none to take away."""
    drift, reference = by_seed(rows, "drift"), by_seed(naive, "drift")
    shared = drift.keys() & reference.keys()
    own, theirs = (sum(d[seed] for seed in shared) for d in (drift, reference))
    if theirs < _SOME_DRIFT * len(shared):
        return ""
    if not own:
        return "no drift"
    return f"{theirs / own:.0f}" if theirs > 10 * own else f"{theirs / own:.1f}"


def _signed(difference: Any) -> str:
    if difference is None:
        return ""
    spread = "" if difference.half_width is None else f" ± {difference.half_width:.3f}"
    return f"{difference.mean:+.3f}{spread}"
