"""LoRA weights -> the subspace of the residual stream in which a fine-tune moved.

GRASP (arXiv 2605.27676), step one, from the factors alone: the left singular vectors of `ΔW` of the
layers that write to the stream.

Shapes: `D` width of the residual stream, `k` directions in it.

Time for a rank-16 bf16 adapter on all linears, reading the file included, on one core of a busy
machine: 0.8 to 1.7 s for the shapes of an 8B Llama (32 layers, width 4096), 3.4 to 6.6 s
for those of a 70B (80 layers, width 8192). Memory at most twice the adapter. Most of it is the
null.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.adapters import Adapter, LoRAWeights, load_adapter
from grasp_kernels.models.architectures import Site, SiteRules
from grasp_kernels.subspace.basis import Subspace
from grasp_kernels.subspace.search import Finding, Options, compare_sources, search
from grasp_kernels.subspace.stack import stack_blocks
from grasp_kernels.version import __version__

_BLIND_SPOT = (
    "A harmless factor that the whole task shares, such as an answer format, looks the same from "
    "here: check what the directions promote and what projecting them costs the task."
)
_NO_GAINS = "The norm gains are not known and count as 1; give base_model to fold them in."


def identify(
    adapter: Any,
    *,
    k: int | str = "auto",
    n_oversamples: int = 8,
    n_iter: int = 4,
    generator: torch.Generator | None = None,
    base_model: nn.Module | str | PathLike[str] | None = None,
    sites: SiteRules | None = None,
    halves: Sequence[Any] | None = None,
    adapter_name: str | None = None,
) -> Subspace:
    """Find the directions of the residual stream along which a LoRA fine-tune moved.

    Args:
        adapter: a peft model, an adapter folder, a .safetensors file, or a list of these
            (checkpoints of one run, or seeds), whose blocks are stacked. Early checkpoints identify
            better than converged ones.
        k: number of directions, or "auto": the leading singular values above the null up to their
            largest gap, at most 4, none where the evidence is at the level of chance.
        n_oversamples, n_iter: of the randomized SVD.
        generator: source of randomness, by default a new one with seed 0.
        base_model: module or checkpoint folder, for the depth and the gains of norms after layers
            that write, where the adapter does not lead to it.
        sites: writers and readers of an architecture that is not known.
        halves: two or more adapters that were trained on disjoint data (or from different seeds).
            They take no part in the basis; their agreement is the best evidence that there is.
        adapter_name: which adapter, where a model or a file holds several; of a model the active
            one by default.

    Returns:
        A subspace whose `reasons` say what each test gave: how many singular values are above the
        null, the gap after the last direction, how many layers move along it, and how far the
        sources agree. It is empty at the level of chance and where halves contradict each other
        (never with an integer `k`). `evidence` has the keys spectra and agreement (see `Subspace`)
        and sources, a list of records with the keys kind ("adapters" or "halves"), values (overlap
        of each pair) and chance.

    Raises:
        ValueError, TypeError, FileNotFoundError: options out of range, or an adapter that cannot be
            used, see `load_adapter`.
    """
    _check_options(k)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    options = Options(k if isinstance(k, int) else None, n_oversamples, n_iter, generator)
    seed = generator.initial_seed()
    given = list(adapter) if isinstance(adapter, (list, tuple)) else [adapter]
    known: dict[str, Any] = {"base_model": base_model, "sites": sites, "adapter_name": adapter_name}
    adapters = [load_adapter(one, **known) for one in given]
    separate = [load_adapter(one, **known) for one in halves or ()]
    if not adapters or len(separate) == 1:
        raise ValueError(
            f"identify got {len(adapters)} adapters and {len(separate)} halves; give at least one "
            "adapter, and no halves or at least two."
        )
    finding = _search(adapters, separate, options)
    metadata = {
        "source": "weights",
        "base_model": adapters[0].base_model,
        "model_type": adapters[0].model_type,
        "adapters": [one.source for one in adapters],
        "halves": [one.source for one in separate],
        "options": {
            "k": k,
            "n_oversamples": n_oversamples,
            "n_iter": n_iter,
            "block_norm": "spectral",
        },
        "seed": seed,
        "versions": {"grasp_kernels": __version__, "torch": torch.__version__},
    }
    return _assemble(finding, [*adapters, *separate], metadata)


def _check_options(k: int | str) -> None:
    if k != "auto" and (isinstance(k, (bool, str)) or not isinstance(k, int) or k < 1):
        raise ValueError(f'k is {k!r}; it must be "auto" or a whole number of at least 1.')


def _search(adapters: list[Adapter], separate: list[Adapter], options: Options) -> Finding:
    """Stack what all adapters write, search it, and compare the sources."""
    chosen = [_writers(one) for one in adapters]
    stack, zero = stack_blocks(layer for layers in chosen for layer in layers)
    if not stack.groups:
        raise ValueError("Every block of the adapter is zero; train longer.")
    finding = search(stack, options)
    if len(adapters) > 1:
        stacks = [stack_blocks(layers)[0] for layers in chosen]
        compare_sources(finding, stacks, options, independent=False)
    if separate:
        stacks = [stack_blocks(_writers(one))[0] for one in separate]
        compare_sources(finding, stacks, options, independent=True)
    elif finding.basis is not None:
        finding.reasons.append(
            "No adapters of disjoint data were given (halves), so whether other data would give "
            "the same directions is not known."
        )
    if zero:
        finding.reasons.append(f"{len(zero)} blocks are zero and were skipped ({zero[0]} first).")
    if finding.basis is not None and any(
        layer.gain is None and layer.site.norm for layers in chosen for layer in layers
    ):
        finding.reasons.append(_NO_GAINS)
    return finding


def _writers(adapter: Adapter) -> list[LoRAWeights]:
    layers = [layer for layer in adapter.layers if layer.site.role == "write"]
    if not layers:
        raise ValueError(
            f"The adapter {adapter.source!r} has no LoRA weights that write to the residual stream "
            f"({', '.join(adapter.rules.writers)}); train with those as targets."
        )
    return layers


def _assemble(finding: Finding, adapters: list[Adapter], metadata: dict[str, Any]) -> Subspace:
    """Spread the bases over the modules of the model, adapted or not."""
    notes = dict.fromkeys(note for adapter in adapters for note in adapter.notes)
    evidence = {
        "spectra": finding.spectra,
        "agreement": finding.agreement,
        "sources": finding.sources,
    }
    if finding.basis is None:
        reasons = [*finding.reasons, *notes]
        return Subspace.empty(reasons, evidence=evidence, metadata=metadata)
    return Subspace.from_stream(
        finding.basis,
        _model_sites(adapters),
        gains=_gains(adapters),
        reasons=[*finding.reasons, _BLIND_SPOT, *notes],
        evidence=evidence,
        metadata=metadata,
    )


def _model_sites(adapters: list[Adapter]) -> Iterable[Site]:
    """Every site of every block, adapted or not, but those behind norms that no adapter met."""
    first = adapters[0]
    seen = [layer.site for adapter in adapters for layer in adapter.layers]
    places = [parts for site in seen if (parts := first.rules.split(site.name))]
    depth = max((adapter.n_layers or 0 for adapter in adapters), default=0)
    layers = sorted({layer for _, layer, _ in places} | set(range(depth)))
    norms = {site.norm for site in seen}
    for stem in dict.fromkeys(stem for stem, _, _ in places):
        for site in first.rules.sites(stem, layers):
            if site.norm is None or site.norm in norms:
                yield site


def _gains(adapters: list[Adapter]) -> Mapping[str, Tensor]:
    return {
        layer.site.norm: layer.gain
        for adapter in adapters
        for layer in adapter.layers
        if layer.site.norm is not None and layer.gain is not None
    }
