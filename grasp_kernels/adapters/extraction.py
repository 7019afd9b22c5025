"""A model whose weights were changed -> the LoRA adapter that is nearest to the change.

A model that was merged or fully fine-tuned holds no adapter, but `ΔW = W' − W` of its linear layers
has a best one of every rank (Eckart and Young, 1936): `ΔW ≈ U S Vᵀ`, `lora_B = U √S`,
`lora_A = √S Vᵀ`, with a scaling of 1. What was merged from rank R comes back with rank R, but for
what the dtype rounded, which is spread over all directions alike.

Shapes: K in, N out, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grasp_kernels.adapters.files import WEIGHTS
from grasp_kernels.files import whole_folder
from grasp_kernels.inert import inert, listed, shown
from grasp_kernels.models.architectures import SiteRules, site_rules
from grasp_kernels.models.names import base_name
from grasp_kernels.models.tensors import refuse_nonfinite
from grasp_kernels.models.weights import (
    HEAD,
    Reader,
    is_transposed,
    model_config,
    model_type_of,
    model_weights,
)
from grasp_kernels.svd import leading_triples

# peft takes what ends like this for parts of the fused experts, and would not load it.
_MISREAD: dict[str, tuple[str, ...]] = {"qwen3_moe": (".gate_proj", ".up_proj", ".down_proj")}
_ROUTER = ".mlp.gate"  # of a mixture of experts: a matrix, and no linear layer
_INPUTS = ("embed_tokens", "embed_in", "wte")  # what a head may be tied to
_CONSTANTS = ("rotary_emb.inv_freq", "attn.masked_bias")  # which older checkpoints store
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Extraction(NamedTuple):
    """What an extracted adapter has of the change, and what changed elsewhere."""

    shares: dict[str, float]  # of ‖ΔW‖², by module, 0 to 1
    total: float  # the share over all of them
    outside: list[str]  # what else is not as in the base: embeddings, norms, biases, experts

    def text(self) -> str:
        """A line or two for a person."""
        worst = min(self.shares, key=self.shares.__getitem__)
        lines = [
            f"{len(self.shares)} layers changed; the adapter has {self.total:.1%} of the squared "
            f"change, of {inert(worst)} {self.shares[worst]:.1%}."
        ]
        if self.outside:
            lines.append(f"Changed too, and not in the adapter: {listed(self.outside)}.")
        return "\n".join(lines)


@torch.no_grad()
def extract_adapter(
    model: nn.Module | str | PathLike[str],
    base: nn.Module | str | PathLike[str],
    out: str | PathLike[str],
    *,
    rank: int = 16,
    sites: SiteRules | None = None,
    device: torch.device | str | None = None,
) -> Extraction:
    """Write what a merged or fully fine-tuned model changed as a peft adapter of its base.

    One weight of each model is in memory at a time, and is decomposed with `torch.svd_lowrank`.

    Args:
        model: the changed model, or its checkpoint folder (safetensors). Where a folder does not
            name weights as the task's model does (one of a bare backbone), give models.
        base: the model that it was made from, or its folder.
        out: the adapter folder, which must not exist.
        rank: R of every layer, or all that a narrower one has.
        sites: rules of an architecture that is not known; the linear layers of its blocks are what
            is extracted.
        device: where to decompose; by default where the base weights are.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: a folder without safetensors.
        ValueError: the models do not differ, or are not of one architecture; quantised or
            non-finite weights; a rank below 1; an adapter that is not merged.
    """
    from tqdm import tqdm

    if Path(out).exists():
        raise FileExistsError(f"{str(out)!r} exists; choose a new folder for the adapter.")
    if rank < 1:
        raise ValueError(f"rank is {rank}; choose at least 1.")
    changed, original = _weights(model, merged=True), _weights(base, merged=False)
    model_type = model_type_of(base)
    rules = site_rules(model_type, original, sites)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    kept: dict[str, tuple[float, float]] = {}
    outside: list[str] = []
    progress = tqdm(
        _differing(changed, original), desc="extract", unit="tensor", leave=False, disable=None
    )
    for name, one, other in progress:
        fits = other is not None and other.ndim == 2 and rules.split(name) is not None
        if not fits or name.endswith((_ROUTER, *_MISREAD.get(str(model_type), ()))):
            outside.append(name)
            continue
        factors[name], kept[name] = _factored(_delta(name, one, other, device), rank)
    if not factors:
        raise ValueError(
            f"No linear layer of a decoder block differs between {_named(model)} and "
            f"{_named(base)} (what differs: {listed(outside) or 'nothing'}); give the model "
            "that was changed, and as base the one that it was made from."
        )
    _write(Path(out), factors, rank, base)
    return Extraction(
        {name: part / whole for name, (part, whole) in kept.items()},
        sum(part for part, _ in kept.values()) / sum(whole for _, whole in kept.values()),
        outside,
    )


def _named(model: nn.Module | str | PathLike[str]) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else repr(str(model))


def _weights(source: nn.Module | str | PathLike[str], *, merged: bool) -> dict[str, Reader]:
    """The weights of a model that stands by itself.

    Raises:
        FileNotFoundError: a folder without safetensors files.
        ValueError: an adapter is not merged, or where none is wanted, merged; the folder of an
            adapter, or of a quantised or multimodal checkpoint.
    """
    if isinstance(source, nn.Module):
        for name, module in source.named_modules():
            if getattr(module, "lora_A", None) and getattr(module, "merged", merged) != merged:
                state = "not merged; give a model with merged adapters"
                if not merged:
                    state = "merged; give as base a model without adapters"
                raise ValueError(f"the adapter of {base_name(name)!r} is {state}.")
        return model_weights(source)
    folder = Path(source)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(source)!r} is an adapter, not a model; give the checkpoint of a whole model."
        )
    stored = model_config(folder)
    for key, what in (("quantization_config", "quantised"), ("vision_config", "multimodal")):
        if stored.get(key):
            raise ValueError(
                f"The checkpoint {str(folder)!r} is {what}, so that its files do not hold the "
                "weights of its layers by name; load it and give the model, not quantised."
            )
    found = model_weights(folder)
    if not found:
        raise FileNotFoundError(
            f"There are no weights in {str(source)!r}; give a model, or a checkpoint folder with "
            "safetensors files."
        )
    return found


def _differing(
    changed: Mapping[str, Reader], original: Mapping[str, Reader]
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Name, changed and original of every tensor that differs, one of each in memory at a time.

    One is None in a model that does not have it. They are compared in the coarser of their dtypes:
    a rounding is no change. A head that is the embedding, which not all models store, is no change
    either.

    Raises:
        ValueError: a weight that is not finite, not here, or quantised.
    """
    for name, read in original.items():
        other = read()
        if name in changed:
            one = changed[name]()
            _refuse_uncomparable(name, one, other)
            if one.shape == other.shape:
                coarser = max(one.dtype, other.dtype, key=_coarseness)
                one, other = one.to(other.device, coarser), other.to(coarser)
            if not torch.equal(one, other):
                yield name, one, other
        elif not _says_nothing(name, other, changed, original):
            yield name, None, other
    for name in (name for name in changed if name not in original):
        one = changed[name]()
        if not _says_nothing(name, one, changed, original):
            yield name, one, None


def _refuse_uncomparable(name: str, *weights: Tensor) -> None:
    for weight in weights:
        plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
        if not plain or (weight.ndim > 1 and weight.dtype not in _DTYPES):
            raise ValueError(
                f"A weight of {shown(name)} is a {type(weight).__name__} of {weight.dtype} on "
                f"{weight.device}; give models that are loaded whole and not quantised."
            )
        refuse_nonfinite(name, weight)


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _says_nothing(
    name: str, tensor: Tensor, changed: Mapping[str, Reader], original: Mapping[str, Reader]
) -> bool:
    """Whether a tensor that one model lacks is a constant, or a head that is an embedding."""
    if name.endswith(_CONSTANTS) or (name.endswith(".attn.bias") and tensor.ndim == 4):
        return True
    return name.endswith(HEAD) and any(
        tensor.shape == e.shape and torch.equal(tensor, e.to(tensor))
        for model in (changed, original)
        for other, read in model.items()
        if other.endswith(_INPUTS)
        for e in [read()]
    )


def _delta(
    name: str, changed: Tensor | None, original: Tensor, device: torch.device | str | None
) -> Tensor:
    """`ΔW[N, K]` in float32."""
    if changed is None:
        raise ValueError(
            f"The model has no weight of {shown(name)}, which its base has; give models of one "
            "architecture."
        )
    if original.shape != changed.shape:
        raise ValueError(
            f"The weights of {shown(name)} have shapes {tuple(original.shape)} and "
            f"{tuple(changed.shape)}; give models of one architecture."
        )
    device = original.device if device is None else device
    return changed.to(device).float() - original.to(device).float()


def _factored(delta: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """`A[R, K]`, `B[N, R]` on the host, and `‖B A‖²` with `‖ΔW‖²`."""
    U, S, Vh = leading_triples(delta, min(rank, *delta.shape))
    root = S.sqrt()
    A, B = (root[:, None] * Vh).contiguous(), (U * root).contiguous()
    whole = float(torch.linalg.vector_norm(delta)) ** 2
    return (A.cpu(), B.cpu()), (min(float(torch.linalg.vector_norm(S)) ** 2, whole), whole)


def _write(
    target: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    rank: int,
    base: nn.Module | str | PathLike[str],
) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    stored = getattr(getattr(base, "config", None), "_name_or_path", "")
    generates = not isinstance(base, nn.Module) or hasattr(base, "prepare_inputs_for_generation")
    narrower = {name: A.shape[0] for name, (A, _) in factors.items() if A.shape[0] != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=narrower,
        alpha_pattern=narrower,
        target_modules=sorted(factors),
        task_type="CAUSAL_LM" if generates else None,
        fan_in_fan_out=is_transposed(base),
        base_model_name_or_path=stored if isinstance(base, nn.Module) else str(base),
        inference_mode=True,
    )
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": factor
        for name, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    with whole_folder(target) as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
