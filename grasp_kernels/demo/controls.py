"""Retrainings that tell the parts of GRASP apart, and what the identified subspace is worth.

Each is the run's own retraining with one thing changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from grasp_kernels.anchor import OwnTextAnchor
from grasp_kernels.demo.world import seeded_generator
from grasp_kernels.run import RunConfig
from grasp_kernels.run.inputs import load_model, prepare
from grasp_kernels.run.stages import train
from grasp_kernels.sites import model_sites
from grasp_kernels.subspace import Subspace

PROJECTION, ANCHOR, RANDOM = "projection alone", "anchor alone", "random subspace"


def train_controls(
    options: RunConfig, found: Subspace, own_text: Path, output: Path
) -> dict[str, Path]:
    """Retrain without the anchor, without the projection, and with a random subspace alone.

    Args:
        found: the subspace of the run; where it is empty there was no retraining to compare with.
        own_text: the anchor of the run.

    Returns:
        Name -> adapter folder.
    """
    if found.is_empty:
        return {}
    inputs = prepare(options, Path(options.model))
    changes: dict[str, dict[str, Any]] = {
        PROJECTION: {"subspace": found},
        ANCHOR: {"anchor": OwnTextAnchor.load(own_text)},
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
