#!/usr/bin/env bash
# torch 2.13.0, CPU: an optimizer with fused=True changes parameters and leaves their version counters as they were.
#
# Autograd finds out by that counter that a tensor, saved by a forward, was changed before its backward. After a fused step
# between the two, backward raises nothing and computes with the new values: for sum(p²) at p = 1, stepped to .5, it gives
# 1 where 2 is right. The same optimizer without fused=True raises. So whatever is cached under a version counter (a merged
# weight, a factor, a dequantised copy) is one step old under Trainer's default optimizer, which is fused on GPUs.
#
# Seen: version after a step 0 with fused=True and 1 or 2 without, for SGD, Adam, AdamW and Adagrad.
# Fails if that changes. Run by hand: bash findings/fused_optimizers_move_no_version.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__)
OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


def stepped(kind, **options):
    """A parameter of 1, used in sum(p²), then moved by one step before the backward."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([p], lr=0.5, weight_decay=0, **options)
    loss = (p * p).sum()
    p.grad, before = torch.ones(3), p._version
    optimizer.step()
    assert (p < 1).all()
    p.grad = None
    return p, loss, p._version - before


for kind in OPTIMIZERS:
    p, loss, moved = stepped(kind, foreach=False)
    assert moved > 0, (kind, moved)
    try:
        loss.backward()
        raise SystemExit(f"{kind.__name__}: backward did not notice the step")
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    p, loss, hidden = stepped(kind, fused=True)
    assert hidden == 0, (kind, hidden)
    loss.backward()
    wrong = 2 * p.detach()  # of the new values; 2 · 1 is right
    assert torch.equal(p.grad, wrong) and (p.grad < 2).all()
    print(f"{kind.__name__}: versions moved {moved} by the plain step, {hidden} by the fused one, "
          f"whose backward then gives {p.grad[0]:.2f} for 2.00 in silence")
PYTHON
