"""Retrainings that tell the parts of GRASP apart, and what the identified subspace is worth.

Each is the run's own retraining with one thing changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from grasp_kernels.anchor import OwnTextAnchor
from grasp_kernels.demo.world import seeded_generator
from grasp_kernels.reads import ContrastiveReads
from grasp_kernels.run import Report, RunConfig
from grasp_kernels.run.inputs import load_model, prepare
from grasp_kernels.run.stages import train
from grasp_kernels.sites import model_sites
from grasp_kernels.subspace import Subspace

PROJECTION, READS, ANCHOR = "projection alone", "reads alone", "anchor alone"
RANDOM = "random subspace"


def train_controls(options: RunConfig, report: Report, output: Path) -> dict[str, Path]:
    """Retrain with each part of what the run did alone, and with a random subspace.

    Args:
        report: of the run; where it found nothing there was no retraining to compare with.

    Returns:
        Name -> adapter folder.
    """
    found = Subspace.load(report.subspace)
    if found.is_empty:
        return {}
    inputs = prepare(options, Path(options.model))
    changes: dict[str, dict[str, Any]] = {
        PROJECTION: {"subspace": found},
        READS: {"reads": ContrastiveReads.load(report.reads)},
        ANCHOR: {"anchor": OwnTextAnchor.load(report.own_text)},
        RANDOM: {"subspace": _random_subspace(options, found.k)},
    }
    adapters = {name: output / name.replace(" ", "-") for name in changes}
    for name, folder in adapters.items():
        if not folder.exists():
            train(
                options,
                inputs,
                out=folder,
                work=output / "work" / folder.name,
                description=f"{name} LoRA",
                **changes[name],
            )
    return adapters


def _random_subspace(options: RunConfig, k: int) -> Subspace:
    model = load_model(Path(options.model), options.dtype)
    directions = torch.randn(
        model.config.hidden_size, k, generator=seeded_generator(options.seed, RANDOM)
    )
    return Subspace.from_stream(directions, model_sites(model), metadata={"source": "random"})
