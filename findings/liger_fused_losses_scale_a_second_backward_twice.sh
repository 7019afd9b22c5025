#!/usr/bin/env bash
# liger-kernel 0.8.5 (torch 2.13.0, Triton 3.9.0 in its interpreter, CPU): the fused linear losses keep their gradient from the
# forward and multiply it in place by the gradient of the loss. A second backward of the same graph multiplies it again: of
# half the loss it gives a quarter of the gradient. And the gradient that the first backward returned is changed with it.
#
# torch's own loss gives the same gradient each time. A graph is gone through twice by retain_graph=True, for two weights of
# a loss or the gradient norms of its parts; with a gradient of exactly 1 (loss.backward()) nothing shows, so a first test passes.
#
# Fails if that changes. Run by hand: bash findings/liger_fused_losses_scale_a_second_backward_twice.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet numpy triton==3.9.0 transformers==5.24.0 liger-kernel==0.8.5
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

torch.manual_seed(0)
hidden, weight, labels = torch.randn(6, 16), torch.randn(50, 16), torch.randint(50, (6,))
teacher = torch.randn(6, 16)
LOSSES = {
    "torch": lambda h: F.cross_entropy(h @ weight.T, labels),
    "Liger, fused linear cross entropy": lambda h: LigerFusedLinearCrossEntropyLoss()(weight, h, labels),
    "Liger, fused linear JSD": lambda h: LigerFusedLinearJSD(jsd_beta=0.0)(h, weight, teacher, weight, None),
}
for name, loss in LOSSES.items():
    for factor, expected in ((1.0, 1.0), (0.5, 1.0 if name == "torch" else 0.5)):
        h = hidden.clone().requires_grad_()
        scaled = factor * loss(h)
        (first,) = torch.autograd.grad(scaled, h, retain_graph=True)
        before = first.clone()
        (second,) = torch.autograd.grad(scaled, h, retain_graph=True)
        ratio = float(second.norm() / before.norm())
        print(f"{name}, {factor} of the loss: the second gradient is {ratio:.2f} of the first")
        assert abs(ratio - expected) < 1e-5
        assert torch.equal(first, before) == (expected == 1.0)
PYTHON
