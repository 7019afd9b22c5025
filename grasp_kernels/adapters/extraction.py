"""A model whose weights were changed -> the LoRA adapter that is nearest to the change.

A model that was merged or fully fine-tuned holds no adapter, but `ΔW = W' − W` of its linear layers
has a best one of every rank (Eckart and Young, 1936): `ΔW ≈ U S Vᵀ`, `lora_B = U √S`,
`lora_A = √S Vᵀ`, with a scaling of 1. What was merged from rank R comes back with rank R, but for
what the dtype rounded, which is spread over all directions alike.

Shapes: K in, N out, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grasp_kernels.adapters.base_model import read_base_model
from grasp_kernels.adapters.files import WEIGHTS, listed
from grasp_kernels.adapters.model_weights import (
    Reader,
    check_merged,
    is_transposed,
    model_weights,
)
from grasp_kernels.files import whole_folder
from grasp_kernels.sites import SiteRules, site_rules
from grasp_kernels.svd import randomized_svd

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_EMBEDDINGS = ("embed_tokens", "embed_in", "wte")  # what a head may be tied to
_HEADS = ("lm_head", "embed_out")  # of GPT-NeoX, as modules and as folders call it
# peft takes what ends like this for parts of the fused experts, and would not load it.
_MISREAD: dict[str, tuple[str, ...]] = {"qwen3_moe": (".gate_proj", ".up_proj", ".down_proj")}


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
            f"change, of {worst} {self.shares[worst]:.1%}."
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

    One weight of each model is in memory at a time, and is decomposed with `randomized_svd`.

    Args:
        model: the changed model, or its checkpoint folder (safetensors). Where a folder does not
            name weights as the task's model does (one of a bare backbone), give models.
        base: the model that it was made from, or its folder.
        out: the adapter folder, which must not exist.
        rank: R of every layer, or all that a narrower one has.
        sites: writers and readers of an architecture that is not known; they are what is extracted.
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
    check_merged(model, True)
    check_merged(base, False)
    changed, original = model_weights(model), model_weights(base)
    model_type = read_base_model(base).model_type
    rules = site_rules(model_type, original, sites)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    kept: dict[str, tuple[float, float]] = {}
    names = [
        name
        for name in original
        if rules.site(name) is not None and not name.endswith(_MISREAD.get(str(model_type), ()))
    ]
    compared = set()
    for name in tqdm(names, desc="extract", unit="layer", leave=False, disable=None):
        delta = _difference(name, changed, original, device)
        if delta is None:
            continue
        compared.add(name)
        if bool(delta.any()):
            factors[name], kept[name] = _factored(delta, rank)
    outside = [n for n in original if n not in compared and _differs(n, changed, original)]
    outside += [
        name for name in changed if name not in original and _is_new(name, changed, original)
    ]
    if not factors:
        raise ValueError(
            "No layer that writes to the residual stream or reads from it differs between the two "
            f"models (what differs: {listed(outside) or 'nothing'}); give the model that was "
            "changed, and as base the one that it was made from."
        )
    _write(Path(out), factors, rank, base)
    return Extraction(
        {name: part / whole for name, (part, whole) in kept.items()},
        sum(part for part, _ in kept.values()) / sum(whole for _, whole in kept.values()),
        outside,
    )


def _difference(
    name: str,
    changed: Mapping[str, Reader],
    original: Mapping[str, Reader],
    device: torch.device | str | None,
) -> Tensor | None:
    """`ΔW[N, K]` in float32, None where the weight is no matrix."""
    if name not in changed and ".experts." in name:
        return None  # checkpoints name each expert, modules fuse them
    if name not in changed:
        raise ValueError(
            f"The model has no weight of {name!r}, which its base has; give models of one "
            "architecture."
        )
    W, W_changed = original[name](), changed[name]()
    for one in (W, W_changed):
        if type(one) not in (Tensor, nn.Parameter) or one.dtype not in _DTYPES or one.is_meta:
            raise ValueError(
                f"A weight of {name!r} is a {type(one).__name__} of {one.dtype} on {one.device}; "
                "give models that are loaded whole and not quantised."
            )
    if W.shape != W_changed.shape:
        raise ValueError(
            f"The weights of {name!r} have shapes {tuple(W.shape)} and {tuple(W_changed.shape)}; "
            "give models of one architecture."
        )
    if W.ndim != 2:
        return None
    device = W.device if device is None else device
    W, W_changed = _alike(W.to(device), W_changed.to(device))
    delta = W_changed.float() - W.float()
    if not bool(torch.isfinite(delta).all()):
        raise ValueError(f"A weight of {name!r} is not finite; give an earlier checkpoint.")
    return delta


def _factored(delta: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """`A[R, K]`, `B[N, R]` on the host, and `‖B A‖²` with `‖ΔW‖²`."""
    U, S, Vh = randomized_svd(delta, min(rank, *delta.shape))
    root = S.sqrt()
    A, B = (root[:, None] * Vh).contiguous(), (U * root).contiguous()
    whole = float(torch.linalg.vector_norm(delta)) ** 2
    return (A.cpu(), B.cpu()), (min(float(torch.linalg.vector_norm(S)) ** 2, whole), whole)


def _differs(name: str, changed: Mapping[str, Reader], original: Mapping[str, Reader]) -> bool:
    """Whether a tensor is another one; one that the changed model does not store is not."""
    if name not in changed:
        return False  # such as a head that is tied to the embedding
    one, other = original[name](), changed[name]()
    if one.is_meta or other.is_meta:
        return one.shape != other.shape
    return not torch.equal(*_alike(one, other.to(one.device)))


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the coarser of their dtypes: a rounding is no change."""
    coarser = max(one.dtype, other.dtype, key=_coarseness)
    return one.to(coarser), other.to(coarser)


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _is_new(name: str, changed: Mapping[str, Reader], original: Mapping[str, Reader]) -> bool:
    """Whether a tensor that the base does not have is a bias, or a head that was untied.

    Other names differ where one of the models is a folder, which may call its experts otherwise.
    """
    if not name.endswith(_HEADS):
        return name.endswith(".bias")
    if any(other.endswith(_HEADS) for other in original):
        return False
    head = changed[name]()
    embeddings = (read() for other, read in changed.items() if other.endswith(_EMBEDDINGS))
    return not any(head.shape == e.shape and torch.equal(head, e) for e in embeddings)


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
