"""Random adapters of a Llama-type model, with planted directions of known strength."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from grasp_kernels.adapters import Adapter, LoRAWeights
from grasp_kernels.models.architectures import RULES, Site, SiteRules

RULE = RULES["llama"]


def unit_directions(width: int, k: int = 1, seed: int = 99) -> Tensor:
    """Orthonormal `[width, k]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, k, generator=generator))[0]


def writers(rule: SiteRules, layers: Iterable[int]) -> list[Site]:
    """The sites that LoRA adapts, of some blocks."""
    names = [f"model.layers.{i}.{rest}" for i in layers for rest in rule.writers]
    return [site for name in names if (site := rule.site(name))]


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
    weights = []
    for site in writers(rule, chosen):
        gain = torch.rand(width, generator=generator) + 0.5 if site.norm else None
        stream = torch.randn(width, rank, generator=generator) / width**0.5
        other = torch.randn(rank, 3 * width, generator=generator) / (3 * width) ** 0.5
        layer = int(site.name.split(".")[2])
        if planted is not None and (carriers is None or layer in carriers):
            for direction in planted.mT:
                mixing = torch.randn(rank, generator=generator) / rank**0.5
                stream += strength * torch.outer(direction, mixing)
        before = stream if gain is None else stream / gain[:, None]
        weights.append(LoRAWeights(site.name, site, other, before, 2.0, gain))
    return Adapter(tuple(weights), f"seed {seed}", None, "llama", rule, ())
