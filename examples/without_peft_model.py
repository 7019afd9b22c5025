"""GraspLoRALinear in a plain PyTorch script, without wrapping a model (`.[train]` is needed).

    python examples/without_peft_model.py

A small network learns a regression whose targets all carry an offset along one direction that
nobody asked for. With that direction as its basis the rest is learned and most of the offset is
not: the outputs move 1.7 of 10 along it, where a stock adapter moves them 9.4.
"""

import torch
from torch import Tensor

import grasp_kernels as gk


def train(x: Tensor, target: Tensor, write_basis: Tensor | None) -> tuple[torch.nn.Module, Tensor]:
    """The trained network, and how its outputs moved."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    before = model(x).detach()
    model[0] = gk.GraspLoRALinear.from_linear(model[0], r=8)
    model[2] = gk.GraspLoRALinear.from_linear(model[2], r=8, write_basis=write_basis)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    return model, model(x).detach() - before


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.linalg.qr(torch.randn(32, 1, generator=generator))[0]
    x = torch.randn(256, 16, generator=generator)
    target = x @ torch.randn(16, 32, generator=generator) + 10 * direction.mT
    for title, basis in (("stock", None), ("projected", direction)):
        model, moved = train(x, target, basis)
        rest = moved - moved @ direction @ direction.mT
        print(f"{title}: moved {(moved @ direction).mean():.2f} along, {rest.norm():.0f} beside")
    print({name: f"leakage {leak:.0e}" for name, leak in gk.leakage(model).items()})


if __name__ == "__main__":
    main()
