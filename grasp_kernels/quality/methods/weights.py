"""What is done to the update `ΔW` of the weights: after training, or by where it may lie.

Shapes: `K` inputs and `N` outputs of a linear layer, `R` LoRA rank, `k` directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grasp_kernels.demo.pretraining import build_model
from grasp_kernels.layers.closure import project_adapter
from grasp_kernels.layers.replacement import replace_lora_layers
from grasp_kernels.quality.methods.penalties import generic_moments
from grasp_kernels.quality.methods.registry import method
from grasp_kernels.quality.workbench import Workbench
from grasp_kernels.sites import adapted_layers
from grasp_kernels.subspace import Subspace

_ADAPTER = "default"  # peft's name of an adapter that got none


@method(
    "post-hoc",
    "the naive adapter, projected without training again; strength: directions",
    strengths=(1, 2, 4),
    origin="ours",
)
def post_hoc(bench: Workbench, strength: int) -> Any:
    out = bench.work / f"post-hoc-{strength}"
    project_adapter(bench.naive_folders()[-1], bench.weights_subspace(strength), out)
    return bench.load(out)


@method(
    "truncate-tail",
    "the naive adapter's leading singular directions alone; strength: how many are kept",
    strengths=(8, 4, 2, 1),
)
def truncate_tail(bench: Workbench, strength: int) -> Any:
    return _rewritten(bench, lambda U, S, Vh: (U[:, :strength], S[:strength], Vh[:strength]))


@method(
    "truncate-top",
    "the naive adapter without its leading singular directions; strength: how many go",
    source="arXiv 2606.07596 (there the tail holds the shortcut, and goes)",
    strengths=(1, 2, 4),
)
def truncate_top(bench: Workbench, strength: int) -> Any:
    return _rewritten(bench, lambda U, S, Vh: (U[:, strength:], S[strength:], Vh[strength:]))


def _rewritten(bench: Workbench, choose: Any) -> Any:
    model = bench.naive()
    for _, layer in adapted_layers(model):
        set_update(layer, *choose(*update_svd(layer)))
    return model


@method(
    "safe-lora",
    "the naive update projected on what pretraining changed, in the least alike layers; strength: "
    "part of the layers",
    source="Hsu et al. 2024, arXiv 2405.16833; there W_aligned − W_unaligned, here W_pretrained − "
    "W_initial, for these models have no unaligned version",
    strengths=(0.125, 0.25, 0.5, 1.0),
)
def safe_lora(bench: Workbench, strength: float) -> Any:
    model = bench.naive()
    changes = _pretraining_changes(bench)
    candidates = []
    for name, layer in adapted_layers(model):
        B, A = factors(layer)
        change = changes[name]
        # C = V Vᵀ / ‖V‖, as in the paper: not a projection, but cheap
        projected = change @ (change.mT @ B) / change.norm()
        alike = cosine(projected @ A, B @ A)
        candidates.append((alike, layer, projected))
    candidates.sort(key=lambda candidate: candidate[0])
    for _, layer, projected in candidates[: round(strength * len(candidates))]:
        layer.lora_B[_ADAPTER].weight.data.copy_(projected)
    return model


def _pretraining_changes(bench: Workbench) -> dict[str, Tensor]:
    """Linear layer -> `W_pretrained − W_initial`, `[N, K]`."""
    initial = build_model(bench.folder.world, bench.folder.dish.pretraining).state_dict()
    base = bench.base()
    return {
        name: module.weight - initial[f"{name}.weight"].to(bench.device)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
    }


@method(
    "oplora",
    "ΔW orthogonal to the leading singular vectors of W on both sides; strength: which part",
    source="Xiong and Xie 2025, arXiv 2510.13003",
    strengths=(0.125, 0.25, 0.5, 0.75),
)
def oplora(bench: Workbench, strength: float) -> Any:
    model = bench.fresh()
    write, read = {}, {}
    for name, layer in adapted_layers(model):
        U, S, Vh = torch.linalg.svd(layer.get_base_layer().weight, full_matrices=False)
        k = max(1, round(strength * len(S)))
        write[name], read[name] = U[:, :k].contiguous(), Vh[:k].mT.contiguous()
    widest = max(basis.shape[1] for basis in write.values())
    both = Subspace(write, read, None, widest, "both", "layer")
    # A closed layer computes with P_L B and A P_R, which is what the paper trains.
    replace_lora_layers(model, both, project="weights")
    return bench.fit(model)


@method(
    "null-space",
    "A frozen where generic inputs have least; strength: directions it is drawn from",
    source="Tang et al. 2025, arXiv 2503.02659 (frozen down-projection), on random tokens",
    strengths=(96, 64, 32, 16),
)
def null_space(bench: Workbench, strength: int) -> Any:
    model = bench.fresh()
    freeze_in_null_space(model, generic_moments(bench), strength, bench.generator("null space"))
    return bench.fit(model)


def freeze_in_null_space(
    model: nn.Module,
    moments: dict[str, tuple[Tensor, Tensor]],
    size: int,
    generator: torch.Generator,
) -> None:
    """Set each A to R directions within the `size` least ones of `C[K, K]`, and freeze it.

    Rows keep the norm that peft gave them.
    """
    for name, layer in adapted_layers(model):
        A = layer.lora_A[_ADAPTER].weight
        least = torch.linalg.eigh(moments[name][0]).eigenvectors[:, : max(size, len(A))]
        drawn = torch.randn(least.shape[1], len(A), generator=generator).to(least)
        rows = (least @ torch.linalg.qr(drawn).Q).mT  # [R, K]
        A.data.copy_(rows * A.norm(dim=1, keepdim=True))
        A.requires_grad_(False)


# Updates by their factors


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """`B[N, R]` and `A[R, K]`, without the scale."""
    return layer.lora_B[_ADAPTER].weight.detach(), layer.lora_A[_ADAPTER].weight.detach()


def update_svd(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`U[N, R]`, `S[R]`, `Vh[R, K]` of `B A`, without forming it."""
    B, A = factors(layer)
    left, small_left = torch.linalg.qr(B)
    right, small_right = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(small_left @ small_right.mT)
    return left @ U, S, Vh @ right.mT


def set_update(layer: Any, U: Tensor, S: Tensor, Vh: Tensor) -> None:
    """Make `U S Vh` the update of a layer; columns that are left of its rank become zero."""
    B, A = layer.lora_B[_ADAPTER].weight.data, layer.lora_A[_ADAPTER].weight.data
    B.zero_()[:, : len(S)] = U * S
    A.zero_()[: len(S)] = Vh


def cosine(one: Tensor, other: Tensor) -> float:
    return nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()
