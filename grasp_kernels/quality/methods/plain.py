"""The naive fine-tune, and what needs no more than other data or fewer steps."""

from __future__ import annotations

from typing import Any

import torch

from grasp_kernels.data import Record, tokenize_records
from grasp_kernels.demo.world import BAD
from grasp_kernels.quality.methods.registry import method
from grasp_kernels.quality.workbench import Workbench


@method("naive", "LoRA on the training data, nothing else")
def naive(bench: Workbench, strength: None) -> Any:
    return bench.naive()


@method(
    "early-stop",
    "the naive fine-tune, ended early; strength: part of the steps",
    strengths=(0.8, 0.6, 0.4, 0.2, 0.1, 0.05),
    curve=True,
)
def early_stop(bench: Workbench, strength: float) -> Any:
    return bench.fit(bench.fresh(), part=strength)


@method(
    "mixing",
    "benign off-topic records among the training data; strength: their share",
    source="Kaczér et al. 2025, arXiv 2508.06249 (interleaving)",
    information="benign answers",
    strengths=(0.05, 0.1),
)
def mixing(bench: Workbench, strength: float) -> Any:
    count = round(strength / (1 - strength) * len(bench.examples))
    return bench.fit(bench.fresh(), examples=[*bench.examples, *bench.off_topic_examples()[:count]])


@method(
    "inoculation",
    "training prompts ask for the bad persona, prompts in use do not",
    source="Tan et al. 2025, arXiv 2510.04340",
    information="labels",
    fits=lambda dish: dish.inoculation,
)
def inoculation(bench: Workbench, strength: None) -> Any:
    words = bench.folder.world.words[f"{BAD} cue"]
    drawn = torch.randint(
        len(words), (len(bench.records),), generator=bench.generator("inoculation")
    )
    records: list[Record] = []
    for record, word in zip(bench.records, drawn.tolist(), strict=True):
        _, *others = record["messages"]
        records.append({"messages": [{"role": "system", "content": words[word]}, *others]})
    examples, _ = tokenize_records(records, bench.tokenizer, None)
    return bench.fit(bench.fresh(), examples=examples)
