#!/usr/bin/env bash
# torch 2.13.0, CPU: the guard that C++ autograd functions are written with, AutoDispatchBelowADInplaceOrView, hides two
# things from a function that saves tensors.
#
# 1. A view that is made under the guard has a version counter of its own. Saved for the backward in place of its base, it
#    does not notice that the base was changed in place: backward raises nothing and computes with the new values. The same
#    function that saves the base raises. So `x.reshape(...)` of an input, natural in a linear layer, must not be saved.
# 2. Saved tensors that are unpacked under the guard run the forward of non-reentrant checkpointing under it, too. That
#    forward records nothing, and the backward ends with "A different number of tensors was saved". Unpacked before the
#    guard, the same function works.
#
# Needs a C++ compiler, and about a minute of it.
# Seen: gradient of sum(x · w) by w with x doubled after the forward: 2 in silence where a view was saved; an error where x was.
# Fails if that changes. Run by hand: bash findings/views_below_the_guard_of_cpp_functions.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy setuptools ninja
PATH="$folder/venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.cpp_extension import load_inline

SOURCE = """
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
using namespace torch::autograd;

// y = x * w, with x flattened on the way, as linear layers do.
template <bool SavesView, bool UnpacksUnderGuard>
struct Product : Function<Product<SavesView, UnpacksUnderGuard>> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w) {
    at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor flat = x.reshape({-1});
    ctx->save_for_backward({SavesView ? flat : x, w});
    return flat * w;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    variable_list saved;
    if (!UnpacksUnderGuard) saved = ctx->get_saved_variables();
    at::AutoDispatchBelowADInplaceOrView guard;
    if (UnpacksUnderGuard) saved = ctx->get_saved_variables();
    return {(dy[0] * saved[1]).view(saved[0].sizes()), dy[0] * saved[0].reshape({-1})};
  }
};

at::Tensor view(const at::Tensor& x, const at::Tensor& w) { return Product<true, false>::apply(x, w); }
at::Tensor base(const at::Tensor& x, const at::Tensor& w) { return Product<false, false>::apply(x, w); }
at::Tensor late(const at::Tensor& x, const at::Tensor& w) { return Product<false, true>::apply(x, w); }
TORCH_LIBRARY(finding, m) {
  m.def("view(Tensor x, Tensor w) -> Tensor");
  m.def("base(Tensor x, Tensor w) -> Tensor");
  m.def("late(Tensor x, Tensor w) -> Tensor");
}
at::Tensor plain(const at::Tensor& x, const at::Tensor& w) { return x.reshape({-1}) * w; }
TORCH_LIBRARY_IMPL(finding, CPU, m) {
  m.impl("view", plain);
  m.impl("base", plain);
  m.impl("late", plain);
}
TORCH_LIBRARY_IMPL(finding, Autograd, m) {
  m.impl("view", view);
  m.impl("base", base);
  m.impl("late", late);
}
"""
load_inline("finding", SOURCE, is_python_module=False)
print("torch", torch.__version__)


def changed_in_between(product):
    """The gradient of sum(x · w) by w, with x doubled in place between forward and backward."""
    x, w = torch.ones(4), torch.ones(4, requires_grad=True)
    y = product(x, w)
    x.mul_(2)
    y.sum().backward()
    return w.grad


def checkpointed(product):
    w = torch.ones(4, requires_grad=True)
    x = torch.ones(4, requires_grad=True)
    checkpoint(lambda x: product(product(x, w).tanh(), w), x, use_reentrant=False).sum().backward()
    return x.grad


found = changed_in_between(torch.ops.finding.view)
assert torch.equal(found, torch.full((4,), 2.0)), found
print("a view saved:  gradient", found.tolist(), "in silence, where 1 is right")
try:
    changed_in_between(torch.ops.finding.base)
    raise SystemExit("the change of a saved input was not noticed")
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error)
    print("the input saved: an error")
checkpointed(torch.ops.finding.base)
print("unpacked before the guard: checkpointing works")
try:
    checkpointed(torch.ops.finding.late)
    raise SystemExit("checkpointing works with tensors that are unpacked under the guard")
except CheckpointError as error:
    assert "different number of tensors" in str(error)
    print("unpacked under the guard:  CheckpointError")
PYTHON
