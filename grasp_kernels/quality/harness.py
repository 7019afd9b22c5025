"""Dishes × methods × seeds -> rows, one by one, so that a run that is stopped goes on.

Strengths are tuned on seeds of their own (`TUNING_SEEDS`) by a fixed rule, see `choose`. A method
that fails makes a row with the reason, and is not tried again while that row is there. Everything
lies in one folder:

    dishes/         checkpoints and chat files
    rows.jsonl      one row per dish, size, method, strength and seed
    strengths.json  dish and size -> method -> the strength that was chosen
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from grasp_kernels.files import check_own_folder
from grasp_kernels.quality.dishes import Dish, find_dish, sized
from grasp_kernels.quality.folder import open_dish
from grasp_kernels.quality.memory import peak_bytes, reset_peak
from grasp_kernels.quality.methods import Method, select
from grasp_kernels.quality.methods.registry import METHODS, Strength
from grasp_kernels.quality.scores import Examiner
from grasp_kernels.quality.workbench import Workbench
from grasp_kernels.run.folder import write_json
from grasp_kernels.version import __version__

TUNING_SEEDS = (100, 101)
TASK_TOLERANCE = 0.01  # of the naive task score; less is no loss that two seeds can show
_ROWS = "rows.jsonl"
BASE = "base"  # the pretrained model, as a method of its own in the rows

Row = dict[str, Any]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        dishes, methods: names; "all" stands for every method.
        seeds: reported seeds.
        size: of the models, a key of `dishes.SIZES`.
        tune: choose strengths on the tuning seeds first; without, those in strengths.json serve.
        device: where models are trained.

    Raises:
        ValueError: an unknown name or size, or a reported seed that strengths are tuned on.
    """

    dishes: tuple[str, ...]
    methods: tuple[str, ...] = ("all",)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    size: str = "small"
    tune: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.dishes:
            sized(find_dish(name), self.size)
        select(self.methods)
        if both := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise ValueError(
                f"Seed {both[0]} is to be reported and tuned on: keep seeds "
                f"{list(self.tuning_seeds)} for tuning."
            )


def run_plan(plan: Plan, output: str | Path, *, progress: bool = False) -> list[Row]:
    """Run what is missing of a plan in the folder `output` and return all rows of that folder."""
    output = Path(output)
    check_own_folder(output, _ROWS, beside=["dishes"])
    output.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(output / _ROWS)
    for name in plan.dishes:
        dish = find_dish(name)
        methods = [m for m in select(plan.methods) if m.fits(dish)]
        if plan.tune:
            for seed in plan.tuning_seeds:
                wanted = [(m, s) for m in _with_naive(methods) for s in _candidates(m)]
                _run_seed(plan, dish, seed, wanted, ledger, output, progress)
        chosen = _strengths(plan, dish, methods, ledger, output)
        for seed in plan.seeds:
            wanted = [(m, s) for m in _with_naive(methods) for s in chosen[m.name]]
            _run_seed(plan, dish, seed, wanted, ledger, output, progress)
    return ledger.rows


class Ledger:
    """Rows on disk; each is appended when it is measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path) if path.exists() else []
        self._known = {_key(row) for row in self.rows}

    def has(self, row: Row) -> bool:
        return _key(row) in self._known

    def add(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")
        self.rows.append(row)
        self._known.add(_key(row))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; a last line that a stopped run left unfinished is dropped.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}: run `grasp-kernels bench quality --output {path.parent}`."
        )
    text = path.read_text(encoding="utf-8")
    whole, _, unfinished = text.rpartition("\n")
    if unfinished:
        path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def choose(method: Method, rows: Iterable[Row], naive_task: float) -> Strength:
    """The `best` strength by its means over the tuning seeds.

    Kept is what comes within `TASK_TOLERANCE` of the naive fine-tune. A strength that failed in a
    seed is out. Of equals the weaker wins.

    Raises:
        ValueError: no strength of the method has worked.
    """
    means: dict[Strength, tuple[float, float]] = {}
    for strength in method.strengths:
        own = [row for row in rows if row["method"] == method.name and row["strength"] == strength]
        if own and not any(row["failure"] for row in own):
            task, drift = (sum(row[part] for row in own) / len(own) for part in ("task", "drift"))
            means[strength] = (task, drift)
    if not means:
        raise ValueError(
            f"No strength of {method.name} has worked on the tuning seeds: see the failures in the "
            "rows."
        )
    return best(means, naive_task)


def best(
    means: Mapping[Key, tuple[float, float]],
    naive_task: float,
    tolerance: float = TASK_TOLERANCE,
) -> Key:
    """The key of the least drift among those that keep the task, else that of the most task.

    Args:
        means: key -> task and drift. Of equals the first wins.
        tolerance: what the task may lack of the naive fine-tune's.
    """
    least = naive_task - tolerance
    kept = {key: drift for key, (task, drift) in means.items() if task >= least}
    if kept:
        return min(kept, key=lambda key: kept[key])
    return max(means, key=lambda key: means[key][0])


def _with_naive(methods: Sequence[Method]) -> list[Method]:
    """The naive fine-tune is what everything is compared with, so it is always there."""
    return [METHODS["naive"], *(m for m in methods if m.name != "naive")]


def _candidates(method: Method) -> tuple[Strength, ...]:
    """What to try on the tuning seeds; of the naive fine-tune itself, for comparison."""
    return method.strengths if method.name == "naive" or method.is_tuned else ()


def _strengths(
    plan: Plan, dish: Dish, methods: Sequence[Method], ledger: Ledger, output: Path
) -> dict[str, tuple[Strength, ...]]:
    """Method -> the strengths to report; chosen ones are kept in strengths.json."""
    path = output / "strengths.json"
    known = read_strengths(path)
    here = known.setdefault(f"{dish.name}-{plan.size}", {})
    rows = [
        row
        for row in ledger.rows
        if (row["dish"], row["size"]) == (dish.name, plan.size) and row["seed"] in plan.tuning_seeds
    ]
    strengths: dict[str, tuple[Strength, ...]] = {"naive": (None,)}
    for method in methods:
        if not method.is_tuned:
            strengths[method.name] = method.strengths
            continue
        if plan.tune:
            here[method.name] = choose(method, rows, _naive_task(rows))
        elif method.name not in here:
            raise ValueError(
                f"{path} has no strength of {method.name} for {dish.name}-{plan.size}: tune first."
            )
        strengths[method.name] = (here[method.name],)
    if plan.tune:
        write_json(path, known)
    return strengths


def read_strengths(path: Path) -> dict[str, dict[str, Strength]]:
    """Dish and size -> method -> the strength that was chosen; nothing where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _naive_task(rows: Iterable[Row]) -> float:
    own = [row for row in rows if row["method"] == "naive"]
    if failed := [row["failure"] for row in own if row["failure"]]:
        raise ValueError(
            f"The naive fine-tune failed on a tuning seed ({failed[0]}): there is nothing to tune "
            "against."
        )
    return sum(row["task"] for row in own) / len(own)


def _run_seed(
    plan: Plan,
    dish: Dish,
    seed: int,
    wanted: list[tuple[Method, Strength]],
    ledger: Ledger,
    output: Path,
    progress: bool,
) -> None:
    """Measure what is wanted of one seed and missing."""

    def head(name: str, strength: Strength) -> Row:
        about = {"dish": dish.name, "size": plan.size, "seed": seed}
        return {**about, "method": name, "strength": strength}

    missing = [(m, s) for m, s in wanted if not ledger.has(head(m.name, s))]
    if not missing:
        return
    folder = open_dish(
        dish, seed, output / "dishes", size=plan.size, device=plan.device, progress=progress
    )
    with tempfile.TemporaryDirectory() as work:
        bench = Workbench(folder, Path(work), device=plan.device)
        examiner = Examiner(folder, bench.base(), bench.tokenizer)
        if not ledger.has(head(BASE, None)):
            measured = _measured(bench, examiner, lambda: bench.base())
            ledger.add({**head(BASE, None), **measured})
        for method, strength in _shown(missing, f"{dish.name} {seed}", progress):
            measured = _measured(bench, examiner, lambda m=method, s=strength: m.build(bench, s))
            ledger.add({**head(method.name, strength), **measured})


def _measured(bench: Workbench, examiner: Examiner, build: Any) -> Row:
    """Scores, seconds, memory and version; or the failure, in words."""
    bench.borrowed_seconds = 0.0
    reset_peak(bench.device)
    start = time.perf_counter()
    about: Row = {"grasp_kernels": __version__, "failure": None}
    try:
        model = build()
        about["seconds"] = time.perf_counter() - start + bench.borrowed_seconds
        about["peak_bytes"] = peak_bytes(bench.device)
        return {**about, **asdict(examiner.examine(model))}
    # A run of hours must not end with one method that diverges or does not fit a dish.
    except (ArithmeticError, RuntimeError, TypeError, ValueError, LookupError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return {**about, "failure": f"{type(error).__name__} in {where}: {error}"}


def _shown(items: list[Any], label: str, progress: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=label, unit="training", disable=not progress)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[part] for part in ("dish", "size", "seed", "method", "strength"))
