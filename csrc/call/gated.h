// The product of a gated MLP, X = act(G) ⊙ U, as a node of autograd: the algebra of
// grasp_kernels/ops/gated.py, in the same order, so that both give the same bits.
//
// Shapes: T tokens, K features of the product.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace grasp {

// The places of their names in `ACTIVATIONS` of ops/gated.py, from one on.
enum Activation : int64_t { kSilu = 1, kGeluTanh = 2 };

// X as a product; undefined tensors and 0 for an X that is none.
struct Gate {
  at::Tensor gate, up;  // G, U [..., K]
  int64_t activation = 0;
};

namespace {

using at::Tensor;

// As in gated.py: what is between two operations stays in the cache of a core.
constexpr int64_t kGateElements = 1 << 17;

Tensor activated(const Tensor& gate, int64_t activation) {
  return activation == kSilu ? at::silu(gate) : at::gelu(gate, "tanh");
}

// Blocks of rows on a CPU; a GPU takes all rows at once.
template <typename Run>
void each_part(const Tensor& rows, const Run& run) {
  const int64_t T = rows.size(0), K = std::max<int64_t>(1, rows.size(1));
  const int64_t step = rows.is_cpu() ? std::max<int64_t>(1, kGateElements / K) : T;
  for (int64_t start = 0; start < T; start += step) run(start, std::min(step, T - start));
}

// dX ⊙ U -> dG.
Tensor of_activation(const Tensor& inner, const Tensor& gate, int64_t activation) {
  return activation == kSilu ? at::silu_backward(inner, gate)
                             : at::gelu_backward(inner, gate, "tanh");
}

// Whether a gradient is many (`is_grads_batched`): those are written to no given memory.
bool is_batched(const Tensor& dx) {
  const c10::DispatchKeySet keys = dx.key_set();
  return keys.has(c10::DispatchKey::Batched) || keys.has(c10::DispatchKey::FuncTorchBatched);
}

Tensor flat(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

}  // namespace

// X [..., K].
inline Tensor product(const Gate& given) {
  const Tensor G = flat(given.gate), U = flat(given.up);
  Tensor X = at::empty_like(U, at::MemoryFormat::Contiguous);
  each_part(G, [&](int64_t start, int64_t rows) {
    Tensor part = X.narrow(0, start, rows);
    at::mul_out(part, activated(G.narrow(0, start, rows), given.activation),
                U.narrow(0, start, rows));
  });
  return X.view(given.up.sizes());
}

struct Gated : public torch::autograd::Function<Gated> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& gate, const Tensor& up,
                        int64_t activation) {
    ctx->save_for_backward({gate, up});
    ctx->saved_data["activation"] = activation;
    const at::AutoDispatchBelowADInplaceOrView below;
    return product({gate, up, activation});
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const Tensor& dx = grads[0];
    if (!dx.defined()) return {Tensor(), Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const int64_t activation = ctx->saved_data["activation"].toInt();
    const Tensor &gate = saved[0], &up = saved[1];
    if (at::GradMode::is_enabled()) {  // create_graph: operations that torch differentiates again
      auto found = torch::autograd::grad({activated(gate, activation) * up}, {gate, up}, {dx},
                                         std::nullopt, true);
      found.emplace_back();
      return found;
    }
    if (is_batched(dx)) {
      return {of_activation(dx * up, gate, activation), dx * activated(gate, activation), Tensor()};
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor D = flat(dx), G = flat(gate), U = flat(up);
    const Tensor dG = at::empty_like(G, at::MemoryFormat::Contiguous),
                 dU = at::empty_like(U, at::MemoryFormat::Contiguous);
    each_part(G, [&](int64_t start, int64_t rows) {
      const auto part = [&](const Tensor& t) { return t.narrow(0, start, rows); };
      Tensor of_gate = part(dG), of_up = part(dU);
      at::mul_out(of_up, part(D), activated(part(G), activation));
      const Tensor inner = part(D) * part(U);
      if (activation == kSilu) {
        at::silu_backward_out(of_gate, inner, part(G));
      } else {
        at::gelu_backward_out(of_gate, inner, part(G), "tanh");
      }
    });
    return {dG.view(gate.sizes()), dU.view(up.sizes()), Tensor()};
  }
};

}  // namespace grasp
