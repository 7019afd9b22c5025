"""What could be projected beside contrastive reads, and when: task and drift without an anchor.

    python benchmarks/quality_variants.py OUT --dishes persona slant two code confound long

Directions of other sources, sizes and sides, a second round of identification, a projection for a
part of the training, and a clamp of the stream, on the seeds that strengths are tuned on. OUT gets
`dishes/` and `variants.jsonl`; what it holds already is kept. At the end it prints the means.

Shapes: `B` records of a batch, `T` tokens, `D` width of the stream, `k` directions.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from grasp_kernels import replace_lora_layers, restore_lora_layers
from grasp_kernels.identification import identify, unite
from grasp_kernels.quality.dishes import DISHES, find_dish
from grasp_kernels.quality.folder import open_dish
from grasp_kernels.quality.harness import TUNING_SEEDS, read_rows
from grasp_kernels.quality.methods.penalties import projected
from grasp_kernels.quality.methods.projection import supervised_subspace
from grasp_kernels.quality.methods.reads import contrastive_model
from grasp_kernels.quality.scores import Examiner
from grasp_kernels.quality.streams import hooked, recorded
from grasp_kernels.quality.workbench import Workbench
from grasp_kernels.run.stream import layer_bases
from grasp_kernels.sites import model_rules
from grasp_kernels.subspace import Subspace

Build = Callable[[Workbench], Any]
_SHOWN = ("task", "drift", "conditional")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--dishes", nargs="+", default=["persona"], choices=DISHES)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(TUNING_SEEDS))
    arguments = parser.parse_args()
    path = arguments.output / "variants.jsonl"
    arguments.output.mkdir(parents=True, exist_ok=True)
    known = read_rows(path) if path.exists() else []
    done = {(row["dish"], row["seed"], row["variant"]) for row in known}
    for dish in arguments.dishes:
        for seed in arguments.seeds:
            missing = [name for name in VARIANTS if (dish, seed, name) not in done]
            for row in rows(arguments.output / "dishes", dish, seed, missing):
                print(f"{dish} {seed} {row['variant']:<28} {row['task']:.3f} / {row['drift']:.3f}")
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                known.append(row)
    print(table(known))


def rows(
    root: Path, dish: str, seed: int, names: list[str], size: str = "small"
) -> Iterator[dict[str, Any]]:
    """One row for each of the variants, in one world."""
    if not names:
        return
    folder = open_dish(find_dish(dish), seed, root, size=size)
    with tempfile.TemporaryDirectory() as work:
        bench = Workbench(folder, Path(work))
        examiner = Examiner(folder, bench.base(), bench.tokenizer)
        for name in names:
            scores = examiner.examine(VARIANTS[name](bench))
            about = {"dish": dish, "seed": seed, "variant": name}
            parts = (*_SHOWN, "good_cue", "facts")
            yield {**about, **{part: getattr(scores, part) for part in parts}}


def table(found: list[dict[str, Any]]) -> str:
    """Means over all worlds that a variant was measured in."""
    lines = ["| beside reads | task | drift | drift, trained cues |", "|---|---|---|---|"]
    for name in VARIANTS:
        own = [row for row in found if row["variant"] == name]
        cells = [f"{mean(row[part] for row in own):.3f}" for part in _SHOWN] if own else []
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def beside_reads(find: Callable[[Workbench], Subspace]) -> Build:
    """Reads, and the projection off what `find` returns."""
    return lambda bench: bench.fit(projected(contrastive_model(bench), find(bench)))


def from_weights(k: int, **options: Any) -> Build:
    return beside_reads(lambda bench: bench.weights_subspace(k, **options))


def identified(bench: Workbench, name: str, make: Callable[[], Any], finished: bool) -> Subspace:
    """One direction, of early checkpoints of another training than the naive one, or of its end."""
    *early, last = bench.once(name, lambda: bench.train_folders(name, make()))
    return identify([str(folder) for folder in ([last] if finished else early)], k=1)


def from_reads(finished: bool) -> Build:
    """Of an adapter that was trained with the reads alone."""
    return beside_reads(
        lambda bench: identified(
            bench, "trained with reads", lambda: contrastive_model(bench), finished
        )
    )


def second_round(bench: Workbench) -> Subspace:
    """And what is left in an adapter that was trained with reads and projection."""
    first = bench.weights_subspace(1)
    return unite(
        first,
        identified(
            bench, "trained with both", lambda: projected(contrastive_model(bench), first), False
        ),
    )


def at_times(part: float, *, later: bool) -> Build:
    """The projection alone after a part of the steps, or alone before."""

    def build(bench: Workbench) -> Any:
        model, subspace = contrastive_model(bench), bench.weights_subspace(1)
        if not later:
            replace_lora_layers(model, subspace)

        def switch(step: int) -> None:
            if step == bench.steps(part) and later:
                replace_lora_layers(model, subspace)
            elif step == bench.steps(part):
                restore_lora_layers(model)

        return bench.fit(model, after_step=switch)

    return build


def clamped(*, also_projected: bool) -> Build:
    """`h − V Vᵀ (h − h_base)` for the output `h[B, T, D]` of every block while it trains."""

    def build(bench: Workbench) -> Any:
        model, subspace = contrastive_model(bench), bench.weights_subspace(1)
        bases = layer_bases(subspace, model_rules(model))
        if also_projected:
            model = projected(model, subspace)
        base: dict[int, Tensor] = {}
        measuring = False

        def look_at_base(_model: Any, _args: Any, inputs: dict[str, Tensor]) -> None:
            nonlocal measuring
            if measuring:
                return
            measuring = True
            ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad(), model.disable_adapter(), recorded(model) as kept:
                model(**ids)
                base.update(kept)
            measuring = False

        def clamp(layer: int, h: Tensor) -> Tensor:
            if measuring:
                return h
            return h - (h - base[layer]) @ bases[layer] @ bases[layer].mT

        handle = model.register_forward_pre_hook(look_at_base, with_kwargs=True)
        with hooked(model, clamp):
            bench.fit(model)
        handle.remove()
        return model

    return build


VARIANTS: dict[str, Build] = {
    "reads alone": lambda bench: bench.fit(contrastive_model(bench)),
    "weights, k = 1": from_weights(1),
    "weights, k = 2": from_weights(2),
    "weights, k = 4": from_weights(4),
    "weights, k = 8": from_weights(8),
    "writers and readers": from_weights(1, side="both"),
    "a basis for each layer": from_weights(1, scope="layer"),
    "self-contrast, k = 1": beside_reads(lambda bench: bench.contrast_subspace(1)),
    "self-contrast, k = 4": beside_reads(lambda bench: bench.contrast_subspace(4)),
    "weights and self-contrast": beside_reads(
        lambda bench: unite(bench.weights_subspace(1), bench.contrast_subspace(1))
    ),
    "labels, k = 1": beside_reads(lambda bench: supervised_subspace(bench, 1)),
    "labels, k = 4": beside_reads(lambda bench: supervised_subspace(bench, 4)),
    "adapter with reads, early": from_reads(finished=False),
    "adapter with reads, finished": from_reads(finished=True),
    "a second round": beside_reads(second_round),
    "from a quarter of the steps on": at_times(0.25, later=True),
    "for three quarters of the steps": at_times(0.75, later=False),
    "clamp": clamped(also_projected=False),
    "clamp and projection": clamped(also_projected=True),
}

if __name__ == "__main__":
    main()
