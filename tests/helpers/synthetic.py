"""Random adapters of a Llama-type model, with planted directions of known strength."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from grasp_kernels.adapters import Adapter, LoRAWeights
from grasp_kernels.models.architectures import RULES, SiteRules

RULE = RULES["llama"]


def unit_directions(width: int, k: int = 1, seed: int = 99) -> Tensor:
    """Orthonormal `[width, k]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, k, generator=generator))[0]


def synthetic_adapter(
    *,
    layers: int = 8,
    width: int = 128,
    rank: int = 8,
    planted: Tensor | None = None,
    strength: float = 2.0,
    carriers: Sequence[int] | None = None,
    adapted: Iterable[int] | None = None,
    rule: SiteRules = RULE,
    seed: int = 0,
) -> Adapter:
    """Gaussian factors; on `carriers` (default: all) each block moves the stream along
    `planted[width, k]`, `strength` times as far as along a typical direction of the noise, behind
    its norm where the rule has one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = list(range(layers) if adapted is None else adapted)
    norms = {site.norm for site in rule.sites("model.layers", chosen)}
    weights = []
    for site in rule.sites("model.layers", chosen):
        if site.role != "write" or site.name in norms:
            continue
        gain = torch.rand(width, generator=generator) + 0.5 if site.norm else None
        stream = torch.randn(width, rank, generator=generator) / width**0.5
        other = torch.randn(rank, 3 * width, generator=generator) / (3 * width) ** 0.5
        if planted is not None and (carriers is None or site.layer in carriers):
            for direction in planted.mT:
                mixing = torch.randn(rank, generator=generator) / rank**0.5
                stream += strength * torch.outer(direction, mixing)
        before = stream if gain is None else stream / gain[:, None]
        weights.append(LoRAWeights(site, other, before, 2.0, gain))
    return Adapter(tuple(weights), f"seed {seed}", None, "llama", layers, rule, ())
