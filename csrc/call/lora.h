// One adapted linear layer as a node of autograd, by calls of torch's own library: the algebra of
// grasp_kernels/ops/lora_linear/aten.py, in the same order, so that both give the same bits.
//
// Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/custom_class.h>

namespace grasp {

// The operands that stay from call to call. The adapter may be wider than the activations.
struct Lora : torch::CustomClassHolder {
  at::Tensor weight;       // W [N, K], frozen; stored as [K, N] if transposed
  at::Tensor bias;         // [N] or undefined, frozen
  at::Tensor lora_A;       // A [R, K]
  at::Tensor lora_B;       // B [N, R]
  at::Tensor lora_bias;    // b [N] or undefined
  at::Tensor write_basis;  // V [N, Q], float32, or undefined
  double scaling = 1.0;
  double dropout_p = 0.0;
  bool residual = true;  // dY itself is projected; else only dA and dB
  bool closed = true;
  bool transposed = false;
};

// Return `Y[..., N]` from `X[..., K]`, with its derivative where one is asked for.
at::Tensor lora_linear(const c10::intrusive_ptr<Lora>& op, const at::Tensor& x);

}  // namespace grasp
