"""Retrainings that show what the identified subspace is worth: the same, with another subspace."""

from __future__ import annotations

from pathlib import Path

import torch

from grasp_kernels.demo.world import seeded_generator
from grasp_kernels.identification import identify_self_contrast
from grasp_kernels.run import RunConfig
from grasp_kernels.run.inputs import load_model, prepare
from grasp_kernels.run.stages import train
from grasp_kernels.sites import model_sites
from grasp_kernels.subspace import Subspace

RANDOM, SELF_CONTRAST = "random subspace", "self-contrast"


def train_controls(options: RunConfig, found: Subspace, output: Path) -> dict[str, Path]:
    """Retrain with a random subspace as large as the one found, and with self-contrast.

    Returns:
        Name -> adapter folder, without those for which there is no subspace.
    """
    inputs = prepare(options, Path(options.model))
    subspaces = {}
    if not found.is_empty:
        subspaces[RANDOM] = _random_subspace(options, found.k)
    subspaces[SELF_CONTRAST] = identify_self_contrast(
        load_model(inputs.checkpoint, options.dtype),
        inputs.tokenizer,
        inputs.records,
        generator=seeded_generator(options.seed, SELF_CONTRAST),
    )
    adapters = {name: output / name.replace(" ", "-") for name in subspaces}
    for name, folder in adapters.items():
        if not folder.exists() and not subspaces[name].is_empty:
            train(
                options,
                inputs,
                out=folder,
                work=output / "work" / folder.name,
                description=f"{name} LoRA",
                subspace=subspaces[name],
            )
    return {name: folder for name, folder in adapters.items() if folder.exists()}


def _random_subspace(options: RunConfig, k: int) -> Subspace:
    model = load_model(Path(options.model), options.dtype)
    directions = torch.randn(
        model.config.hidden_size, k, generator=seeded_generator(options.seed, RANDOM)
    )
    return Subspace.from_stream(directions, model_sites(model), metadata={"source": "random"})
