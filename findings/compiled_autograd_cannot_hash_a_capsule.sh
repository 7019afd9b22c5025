#!/usr/bin/env bash
# torch 2.13.0, CPU: a C++ autograd function that keeps a pointer (IValue capsule) in `saved_data` works everywhere but under
# compiled autograd, whose backward fails with "unhashable type: 'Capsule'". With the same facts as a list of integers it works.
#
# `saved_data` takes any IValue, and a capsule is its way to keep a structure of one's own. Compiled autograd compares and
# replays what a node holds, and has no way to compare a pointer. FSDP2 with torch.compile turns it on. So a library tested
# with torch's own engine alone fails in somebody's backward.
#
# Needs a C++ compiler, and about a minute of it.
# Fails if that changes. Run by hand: bash findings/compiled_autograd_cannot_hash_a_capsule.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy setuptools ninja
PATH="$folder/venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch._dynamo import compiled_autograd
from torch.utils.cpp_extension import load_inline

SOURCE = """
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>
using namespace torch::autograd;

struct Factor : torch::CustomClassHolder {
  int64_t value = 3;
};

template <bool Pointer>
struct Scaled : Function<Scaled<Pointer>> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (Pointer) {
      ctx->saved_data["factor"] = at::IValue::make_capsule(c10::make_intrusive<Factor>());
    } else {
      ctx->saved_data["factor"] = std::vector<int64_t>{3};
    }
    return x * 3;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const at::IValue& kept = ctx->saved_data["factor"];
    const int64_t factor = Pointer
        ? c10::static_intrusive_pointer_cast<Factor>(kept.toCapsule())->value
        : kept.toIntVector()[0];
    return {dy[0] * factor};
  }
};

at::Tensor capsule(const at::Tensor& x) { return Scaled<true>::apply(x); }
at::Tensor numbers(const at::Tensor& x) { return Scaled<false>::apply(x); }
TORCH_LIBRARY(finding, m) {
  m.def("capsule(Tensor x) -> Tensor");
  m.def("numbers(Tensor x) -> Tensor");
}
TORCH_LIBRARY_IMPL(finding, Autograd, m) {
  m.impl("capsule", capsule);
  m.impl("numbers", numbers);
}
"""
load_inline("finding", SOURCE, is_python_module=False)
print("torch", torch.__version__)


def gradient(scaled, compiled):
    x = torch.ones(2, requires_grad=True)
    y = scaled(x).sum()
    if compiled:
        with compiled_autograd._enable(torch.compile(backend="eager")):
            y.backward()
    else:
        y.backward()
    return x.grad.tolist()


for scaled in (torch.ops.finding.capsule, torch.ops.finding.numbers):
    assert gradient(scaled, compiled=False) == [3.0, 3.0]
assert gradient(torch.ops.finding.numbers, compiled=True) == [3.0, 3.0]
print("usual backward: 3 and 3; compiled backward with a list of numbers: 3")
try:
    gradient(torch.ops.finding.capsule, compiled=True)
    raise SystemExit("compiled autograd takes a capsule")
except RuntimeError as error:
    assert "unhashable" in str(error) and "Capsule" in str(error), error
    print("compiled backward with a capsule:", str(error).splitlines()[0])
PYTHON
