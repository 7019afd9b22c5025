"""LoRA weights -> the subspace of the residual stream in which a fine-tune moved.

GRASP (arXiv 2605.27676), step one, from the factors alone: writers by the left singular vectors of
their `ΔW`, readers by the right ones with the norm's gain folded in.

Shapes: `D` width of the residual stream, `k` directions in it.

Time for a rank-16 bf16 adapter on all linears, write side, reading the file included, on one core
of a busy machine: 0.8 to 1.7 s for the shapes of an 8B Llama (32 layers, width 4096), 3.4 to 6.6 s
for those of a 70B (80 layers, width 8192). Memory at most twice the adapter. Most of it is the
null.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.adapters import Adapter, load_adapter
from grasp_kernels.choices import SIDES
from grasp_kernels.models.architectures import Site, SiteRules
from grasp_kernels.subspace.basis import Subspace
from grasp_kernels.subspace.search import Finding, Options, compare_sources, search
from grasp_kernels.subspace.stack import stack_blocks
from grasp_kernels.version import __version__

_BLIND_SPOT = (
    "A harmless factor that the whole task shares, such as an answer format, looks the same from "
    "here: check what the directions promote and what projecting them costs the task."
)
_READ_CAVEAT = (
    "Read directions mean something only once lora_A has moved away from its initialisation, which "
    "the weights do not tell, and they often follow the mean activation."
)


def identify(
    adapter: Any,
    *,
    k: int | str = "auto",
    side: str = "write",
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
        side: "write", "read" or "both".
        n_oversamples, n_iter: of the randomized SVD.
        generator: source of randomness, by default a new one with seed 0.
        base_model: module or checkpoint folder, for the norm gains (read side) and the depth, where
            the adapter does not lead to it.
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
        and sources, a list of records with the keys side, kind ("adapters" or "halves"), values
        (overlap of each pair) and chance.

    Raises:
        ValueError, TypeError, FileNotFoundError: options out of range, or an adapter that cannot be
            used, see `load_adapter`.
    """
    _check_options(k, side)
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
    sides = ("write", "read") if side == "both" else (side,)
    findings = [_search(adapters, separate, one, options) for one in sides]
    metadata = {
        "source": "weights",
        "base_model": adapters[0].base_model,
        "model_type": adapters[0].model_type,
        "adapters": [one.source for one in adapters],
        "halves": [one.source for one in separate],
        "options": {
            "k": k,
            "side": side,
            "n_oversamples": n_oversamples,
            "n_iter": n_iter,
            "block_norm": "spectral",
        },
        "seed": seed,
        "versions": {"grasp_kernels": __version__, "torch": torch.__version__},
    }
    return _assemble(findings, [*adapters, *separate], side, metadata)


def _check_options(k: int | str, side: str) -> None:
    if k != "auto" and (isinstance(k, (bool, str)) or not isinstance(k, int) or k < 1):
        raise ValueError(f'k is {k!r}; it must be "auto" or a whole number of at least 1.')
    if side not in SIDES:
        raise ValueError(f"side is {side!r}; it must be one of {', '.join(SIDES)}.")


def _search(
    adapters: list[Adapter], separate: list[Adapter], side: str, options: Options
) -> Finding:
    """Stack one side of all adapters, search it, and compare the sources."""
    chosen = [_of_side(one, side) for one in adapters]
    stack, zero = stack_blocks(layer for layers in chosen for layer in layers)
    if not stack.groups:
        raise ValueError(
            f"Every {side} block of the adapter is zero; identify on the other side, or train "
            "longer."
        )
    finding = search(stack, side, options)
    if len(adapters) > 1:
        stacks = [stack_blocks(layers)[0] for layers in chosen]
        compare_sources(finding, stacks, options, independent=False)
    if separate:
        stacks = [stack_blocks(_of_side(one, side))[0] for one in separate]
        compare_sources(finding, stacks, options, independent=True)
    elif finding.basis is not None:
        finding.reasons.append(
            "No adapters of disjoint data were given (halves), so whether other data would give "
            "the same directions is not known."
        )
    if zero:
        finding.reasons.append(f"{len(zero)} blocks are zero and were skipped ({zero[0]} first).")
    if finding.basis is not None:
        finding.reasons += _caveats(side, chosen)
    return finding


def _of_side(adapter: Adapter, side: str) -> list[Any]:
    layers = [layer for layer in adapter.layers if layer.site.role == side]
    if not layers:
        other = "read" if side == "write" else "write"
        names = adapter.rules.writers if side == "write" else tuple(adapter.rules.readers)
        raise ValueError(
            f"The adapter {adapter.source!r} has no LoRA weights on the {side} side "
            f"({', '.join(names)}); train with those as targets, or identify with side={other!r}."
        )
    return layers


def _caveats(side: str, chosen: list[list[Any]]) -> Iterator[str]:
    if side == "read":
        yield _READ_CAVEAT
    if any(layer.gain is None and layer.site.norm for layers in chosen for layer in layers):
        yield "The norm gains are not known and count as 1; give base_model to fold them in."


def _assemble(
    findings: list[Finding],
    adapters: list[Adapter],
    side: str,
    metadata: dict[str, Any],
) -> Subspace:
    """Spread the bases over the modules of the model, adapted or not."""
    notes = dict.fromkeys(note for adapter in adapters for note in adapter.notes)
    evidence = {
        "spectra": [record for finding in findings for record in finding.spectra],
        "agreement": [record for finding in findings for record in finding.agreement],
        "sources": [record for finding in findings for record in finding.sources],
    }
    parts = {
        finding.side: Subspace.from_stream(
            finding.basis,
            _model_sites(adapters, finding.side),
            gains=_gains(adapters),
            side=finding.side,
        )
        for finding in findings
        if finding.basis is not None
    }
    caveats = [_BLIND_SPOT] if parts else []
    reasons = [
        *(sentence for finding in findings for sentence in finding.reasons),
        *caveats,
        *notes,
    ]
    if not parts:
        return Subspace.empty(side, reasons, evidence=evidence, metadata=metadata)
    write = parts.get("write")
    read = parts.get("read")
    return Subspace(
        write.write if write else {},
        read.read if read else {},
        write.stream if write else None,
        max(part.k for part in parts.values()),
        side,
        tuple(reasons),
        evidence,
        metadata,
    )


def _model_sites(adapters: list[Adapter], side: str) -> Iterable[Site]:
    """Every site of every block, adapted or not, but those behind norms that no adapter met."""
    first = adapters[0]
    seen = [layer.site for adapter in adapters for layer in adapter.layers]
    places = [parts for site in seen if (parts := first.rules.split(site.name))]
    depth = max((adapter.n_layers or 0 for adapter in adapters), default=0)
    layers = sorted({layer for _, layer, _ in places} | set(range(depth)))
    norms = {site.norm for site in seen}
    for stem in dict.fromkeys(stem for stem, _, _ in places):
        for site in first.rules.sites(stem, layers):
            if site.role == side and (site.norm is None or site.norm in norms):
                yield site


def _gains(adapters: list[Adapter]) -> Mapping[str, Tensor]:
    return {
        layer.site.norm: layer.gain
        for adapter in adapters
        for layer in adapter.layers
        if layer.site.norm is not None and layer.gain is not None
    }
