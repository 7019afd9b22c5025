"""A model with changed weights -> the LoRA adapter nearest to the change.

A model that was merged or fully fine-tuned holds no adapter, but `ΔW = W' − W` of its linear layers
has a best one of every rank (Eckart and Young, 1936): `ΔW ≈ U S Vᵀ`, `lora_B = U √S`,
`lora_A = √S Vᵀ`, with a scaling of 1. A merged adapter of rank R comes back with rank R, but for
the rounding of the dtype: rounding errors are spread over all directions alike.

Shapes: K in, N out, R LoRA rank.
"""

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp_kernels.adapters.files import WEIGHTS
from grasp_kernels.files import new_folder, whole_folder
from grasp_kernels.inert import inert, listed, shown
from grasp_kernels.models.architectures import SiteRules, site_rules
from grasp_kernels.models.difference import compared, whole_model
from grasp_kernels.models.weights import Source, is_transposed, model_type_of
from grasp_kernels.progress import bar
from grasp_kernels.svd import leading_triples

# peft takes names with these endings for parts of the fused experts, and would not load them.
_MISREAD: dict[str, tuple[str, ...]] = {"qwen3_moe": (".gate_proj", ".up_proj", ".down_proj")}
_ROUTER = ".mlp.gate"  # of a mixture of experts: a matrix, but not a linear layer


class Extraction(NamedTuple):
    """Share of the change in an extracted adapter, and the changes elsewhere."""

    shares: dict[str, float]  # of `‖ΔW‖²`, by module, 0 to 1
    total: float  # share over all modules, 0 to 1
    outside: list[str]  # names of other changes: embeddings, norms, biases, experts

    def text(self) -> str:
        """Return the shares and the changes elsewhere as a sentence or two."""
        worst = min(self.shares, key=self.shares.__getitem__)
        lines = [
            f"{len(self.shares)} layers changed; the adapter holds {self.total:.1%} of the squared "
            f"change (the least, {self.shares[worst]:.1%}, in {inert(worst)})."
        ]
        if self.outside:
            lines.append(f"Also changed, but not in the adapter: {listed(self.outside)}.")
        return "\n".join(lines)


@torch.no_grad()
def extract_adapter(
    model: Source,
    base: Source,
    out: str | PathLike[str],
    *,
    rank: int = 16,
    sites: SiteRules | None = None,
    device: torch.device | str | None = None,
) -> Extraction:
    """Write the change of a merged or fully fine-tuned model as a peft adapter of its base.

    One weight of each model is in memory at a time, and is decomposed with `torch.svd_lowrank`.

    Args:
        model: the changed model, or its checkpoint folder (safetensors). Give models where a folder
            does not name weights as the task's model does (a folder of a bare backbone).
        base: the original model, or its folder.
        out: the adapter folder, which must not exist.
        rank: rank of every layer; a narrower layer gets its full rank, and zeros to the others'.
        sites: rules of an unknown architecture; the linear layers of its blocks are extracted.
        device: device of the decomposition; None: that of the base weights.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: a folder without safetensors.
        ValueError: the models do not differ, or are not of one architecture; quantised or
            non-finite weights; a rank below 1; an adapter that is not merged.
    """
    target = new_folder(out)
    if rank < 1:
        raise ValueError(f"rank is {rank}; choose at least 1.")
    changed, original = whole_model(model, merged=True), whole_model(base, merged=False)
    model_type = model_type_of(base)
    rules = site_rules(model_type, original, sites)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    kept: dict[str, tuple[float, float]] = {}
    outside: list[str] = []
    pairs = compared(changed, original)
    for name, one, other in bar(pairs, desc="extract", unit="tensor", leave=False, disable=None):
        if one is other:
            continue
        fits = other is not None and other.ndim == 2 and rules.split(name) is not None
        if not fits or name.endswith((_ROUTER, *_MISREAD.get(str(model_type), ()))):
            outside.append(name)
            continue
        factors[name], kept[name] = _factored(_delta(name, one, other, device), rank)
    if not factors:
        raise ValueError(
            f"No linear layer of a decoder block differs between {_named(model)} and "
            f"{_named(base)} (differences elsewhere: {listed(outside) or 'none'}); give the "
            "changed model, and as the base the model that it was made from."
        )
    _write(target, factors, rank, base)
    return Extraction(
        {name: part / whole for name, (part, whole) in kept.items()},
        sum(part for part, _ in kept.values()) / sum(whole for _, whole in kept.values()),
        outside,
    )


def _named(model: Source) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else repr(str(model))


def _delta(name: str, changed: Tensor | None, original: Tensor, device: Any) -> Tensor:
    """Return `ΔW[N, K]` in float32."""
    if changed is None:
        raise ValueError(
            f"The model has no weight {shown(name)}, but its base does; give two models of the "
            "same architecture."
        )
    if original.shape != changed.shape:
        raise ValueError(
            f"The weights of {shown(name)} have shapes {tuple(original.shape)} and "
            f"{tuple(changed.shape)}; give models of one architecture."
        )
    device = original.device if device is None else device
    return changed.to(device).float() - original.to(device).float()


def _factored(delta: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """Return `A[R, K]`, `B[N, R]` on the host, and `‖B A‖²` with `‖ΔW‖²`."""
    U, S, Vh = leading_triples(delta, min(rank, *delta.shape))
    root = S.sqrt()
    A, B = (root[:, None] * Vh).contiguous(), (U * root).contiguous()
    whole = float(torch.linalg.vector_norm(delta)) ** 2
    return (A.cpu(), B.cpu()), (min(float(torch.linalg.vector_norm(S)) ** 2, whole), whole)


def _write(target: Path, factors: dict[str, tuple[Tensor, Tensor]], rank: int, base: Any) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    stored = getattr(getattr(base, "config", None), "_name_or_path", "")
    generates = not isinstance(base, nn.Module) or hasattr(base, "prepare_inputs_for_generation")
    rank = max(A.shape[0] for A, _ in factors.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        task_type="CAUSAL_LM" if generates else None,
        fan_in_fan_out=is_transposed(base),
        base_model_name_or_path=stored if isinstance(base, nn.Module) else str(base),
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():  # one rank, by zeros: not all software reads patterns
        more, key = rank - len(A), f"base_model.model.{name}.lora_"
        tensors[f"{key}A.weight"] = F.pad(A, (0, 0, 0, more))
        tensors[f"{key}B.weight"] = F.pad(B, (0, more))
    with whole_folder(target) as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
