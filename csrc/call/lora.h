// One adapted linear layer as a node of autograd, by calls of torch's own library: the algebra of
// grasp_kernels/ops/lora_linear/aten.py, in the same order, so that both give the same bits.
//
// Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
#pragma once

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <bit>
#include <functional>
#include <limits>
#include <vector>

#include "gated.h"

namespace grasp {

// The operands that stay from call to call. The adapter may be wider than the activations.
struct Lora {
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

namespace {

using at::ScalarType;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Rows = std::function<void(int64_t, int64_t)>;

// As in dropout.py: a part of the definition of the mask.
constexpr int64_t kBlockElements = 1 << 20;
constexpr char kTwice[] =
    "lora_linear cannot be differentiated twice; for gradients of gradients, restore the stock "
    "layers with remove_grasp.";

// Below autograd, and every product in the dtype of its operands.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

Tensor as(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }

Tensor shaped(const Tensor& y, at::IntArrayRef like) {
  if (like.size() == 2) return y;
  std::vector<int64_t> sizes = like.vec();
  sizes.back() = y.size(1);
  return y.view(sizes);
}

bool is_blas_layout(const Tensor& m) {
  const int64_t T = m.size(0), N = m.size(1), row = m.stride(0), column = m.stride(1);
  return (column == 1 && row >= std::max<int64_t>(1, N)) ||
         (row == 1 && column >= std::max<int64_t>(1, T));
}

// (I − V Vᵀ) M in float32 at least; M without a basis.
Tensor project_columns(const Tensor& m, const Tensor& basis) {
  if (!basis.defined()) return m;
  const Tensor wide = as(m, c10::promoteTypes(m.scalar_type(), at::kFloat));
  const Tensor V = as(basis, wide.scalar_type()), along = at::matmul(V.mT(), wide);
  return wide.dim() == 2 ? at::addmm(wide, V, along, 1, -1) : wide - at::matmul(V, along);
}

void each_block(const Tensor& x, const Rows& run) {
  const int64_t T = x.size(0),
                rows = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, x.size(1)));
  for (int64_t start = 0; start < T; start += rows) run(start, std::min(rows, T - start));
}

// s L R in one launch: with a beta of 0 addmm does not read its first operand.
Tensor scaled(double s, const Tensor& left, const Tensor& right) {
  if (s == 1.0) return at::mm(left, right);
  return at::addmm(at::empty({}, left.options()), left, right, 0, s);
}

// s L Xᵀ [R, T] in the dtype of L[R, K], for X[T, K].
Tensor across(const Tensor& left, const Tensor& x, double s = 1.0) {
  if (left.scalar_type() == x.scalar_type()) return scaled(s, left, x.mT());
  Tensor found = at::empty({left.size(0), x.size(0)}, left.options());
  each_block(x, [&](int64_t start, int64_t rows) {
    found.narrow(1, start, rows)
        .copy_(at::matmul(left, as(x.narrow(0, start, rows), left.scalar_type()).mT()));
  });
  return s == 1.0 ? found : found.mul_(s);
}

// s S X [R, K] in the dtype of S[R, T], for X[T, K].
Tensor along(const Tensor& S, const Tensor& x, double s = 1.0) {
  if (S.scalar_type() == x.scalar_type()) return scaled(s, S, x);
  Tensor found = at::zeros({S.size(0), x.size(1)}, S.options());
  each_block(x, [&](int64_t start, int64_t rows) {
    found.addmm_(S.narrow(1, start, rows), as(x.narrow(0, start, rows), S.scalar_type()), 1, s);
  });
  return found;
}

// Y += s Sᵀ R in place, for S[R, T] and R[R, N], rounded once.
void add_(const Tensor& y, const Tensor& S, const Tensor& right, double s = 1.0) {
  if (S.scalar_type() == y.scalar_type()) {
    y.addmm_(S.mT(), right, 1, s);
    return;
  }
  each_block(y, [&](int64_t start, int64_t rows) {
    y.narrow(0, start, rows).add_(at::matmul(S.narrow(1, start, rows).mT(), right), s);
  });
}

// Y + s Sᵀ R in new memory.
Tensor plus(const Tensor& y, const Tensor& S, const Tensor& right, double s) {
  if (S.scalar_type() == y.scalar_type()) return at::addmm(y, S.mT(), right, 1, s);
  const Tensor found = y.clone();
  add_(found, S, right, s);
  return found;
}

int64_t draw_seed() {
  const auto most = std::numeric_limits<int64_t>::max();
  return at::randint(0, most, {1}, at::TensorOptions(at::kLong)).item<int64_t>();
}

// The mask of dropout, 0 or 1 / (1 − p), by blocks of rows.
template <typename Run>
void each_mask(const Tensor& x, int64_t seed, double p, ScalarType dtype, const Run& run) {
  at::Generator generator = at::globalContext().defaultGenerator(x.device()).clone();
  generator.set_current_seed(static_cast<uint64_t>(seed));
  const double keep = 1.0 - p;
  each_block(x, [&](int64_t start, int64_t rows) {
    Tensor mask = at::empty_like(x.narrow(0, start, rows), at::MemoryFormat::Contiguous);
    mask = as(mask.bernoulli_(keep, generator), dtype);
    run(start, rows, keep > 0 ? mask.div_(keep) : mask);
  });
}

Tensor weight_of(const Lora& op, ScalarType dtype) {
  const Tensor weight = as(op.weight, dtype);
  return op.transposed ? weight.mT() : weight;
}

struct Forward {
  Tensor y, S, A, B;
};

// Y[T, N], A X̃ᵀ [R, T] and the factors as they were multiplied.
Forward forward(const Lora& op, const Tensor& x, ScalarType dtype, int64_t seed) {
  const Tensor none, &V = op.closed ? op.write_basis : none;
  const Tensor A = as(op.lora_A, dtype), B = as(project_columns(op.lora_B, V), dtype);
  Tensor S;
  if (op.dropout_p == 0.0) {
    S = across(A, x);
  } else {
    S = at::empty({A.size(0), x.size(0)}, A.options());
    each_mask(x, seed, op.dropout_p, dtype, [&](int64_t start, int64_t rows, Tensor mask) {
      S.narrow(1, start, rows).copy_(at::matmul(A, mask.mul_(x.narrow(0, start, rows)).mT()));
    });
  }
  const Tensor weight = weight_of(op, x.scalar_type());
  Tensor bias = op.bias;
  if (op.lora_bias.defined()) {
    const Tensor b = op.scaling * as(project_columns(op.lora_bias, V), dtype);
    bias = bias.defined() ? as(bias, x.scalar_type()) + b : b;
  }
  if (bias.defined()) bias = as(bias, x.scalar_type());
  Tensor y = at::linear(x, weight, bias.defined() ? std::optional(bias) : std::nullopt);
  add_(y, S, B.mT(), op.scaling);
  return {y, S, A, B};
}

struct Gradients {
  Tensor x, A, B, b;
};

// The needed gradients, in the dtype of their computation; undefined where not needed.
Gradients backward(const Lora& op, Tensor dy, const Tensor& x, const Tensor& S, const Tensor& A,
                   const Tensor& B, int64_t seed, bool needs_x, bool needs_A, bool needs_B,
                   bool needs_b) {
  if (!is_blas_layout(dy)) dy = dy.contiguous();
  const double s = op.scaling;
  const ScalarType dtype = dy.scalar_type(), wide = A.scalar_type();
  const Tensor& V = op.write_basis;
  Gradients found;
  Tensor projected;  // dY' where it is computed
  if (needs_x || needs_A) {
    const bool basis = op.residual && V.defined(), drops = op.dropout_p > 0.0;
    const Tensor left = basis && !op.closed ? as(project_columns(B, V), wide).mT() : B.mT();
    const Tensor weight = weight_of(op, dtype);
    Tensor skinny, right = A;  // dX += Lᵀ M; the first R rows of L are dSᵀ
    if (!needs_x || !basis) {
      if (needs_x) found.x = at::mm(dy, weight);
      skinny = across(left, dy, s);
    } else if (2 * dy.size(0) < weight.size(1)) {
      skinny = across(left, dy, s);
      const Tensor Vt = as(V.mT(), wide);
      projected = plus(dy, across(Vt, dy), Vt, -1.0);
      found.x = at::mm(projected, weight);
    } else {
      const Tensor Vt = as(V.mT(), wide);
      skinny = across(at::cat({s * left, Vt}), dy);
      found.x = at::mm(dy, weight);
      right = at::cat({A, -as(at::mm(as(V, dtype).mT(), weight), wide)});
    }
    const int64_t R = A.size(0), more = skinny.size(0) - R;
    const Tensor dS = more == 0 ? skinny : skinny.narrow(0, 0, R);
    if (!drops) {
      if (needs_x) add_(found.x, skinny, right);
      if (needs_A) found.A = along(dS, x);
    } else {
      if (needs_x && more > 0) add_(found.x, skinny.narrow(0, R, more), right.narrow(0, R, more));
      if (needs_A)
        found.A = at::zeros(
            A.sizes(), at::TensorOptions(A.options()).dtype(c10::promoteTypes(wide, at::kFloat)));
      each_mask(x, seed, op.dropout_p, wide, [&](int64_t start, int64_t rows, Tensor mask) {
        const Tensor dS_block = dS.narrow(1, start, rows);
        if (needs_x) {
          const Tensor dx_block = found.x.narrow(0, start, rows),
                       through = at::matmul(dS_block.mT(), A);
          if (dtype == wide) {
            dx_block.addcmul_(through, mask);
          } else {
            dx_block.add_(through.mul_(mask));
          }
        }
        if (needs_A) found.A.add_(at::matmul(dS_block, mask.mul_(x.narrow(0, start, rows))));
      });
    }
  }
  if (needs_B) {
    const bool exact = projected.defined() && (dtype == at::kFloat || dtype == at::kDouble);
    const Tensor& given = exact ? projected : dy;
    const Tensor dB =
        S.scalar_type() == dtype ? scaled(s, given.mT(), S.mT()) : along(S, given, s).mT();
    found.B = exact ? dB : project_columns(dB, V);
  }
  if (needs_b) {
    const Tensor total = at::sum(dy, at::IntArrayRef{0}, false, wide);
    found.b = project_columns(s * total, V);
  }
  return found;
}

// A stand-in for an X that was not kept: its shape, dtype and device, in one element.
Tensor stand_in(const Tensor& dy, int64_t K) {
  return at::empty({}, dy.options()).expand({dy.size(0), K});
}

struct Call {
  ScalarType compute, wide;  // of the activations, and of the adapter's products
};

// Autocast casts everything; without it the wider of both is the dtype of the adapter's products.
Call call_of(const Lora& op, const Tensor& x) {
  const auto device = x.device().type();
  if (at::autocast::is_autocast_enabled(device) && x.scalar_type() != at::kDouble) {
    const ScalarType dtype = at::autocast::get_autocast_dtype(device);
    return {dtype, dtype};
  }
  return {x.scalar_type(), c10::promoteTypes(x.scalar_type(), op.lora_A.scalar_type())};
}

// What the backward needs besides tensors, as one list of numbers: compiled autograd compares what
// a node holds, and knows neither pointers nor structures.
std::vector<int64_t> packed(const Lora& op, const Tensor& x, int64_t seed, int64_t activation) {
  const auto dtype = [](const Tensor& t) {
    return static_cast<int64_t>(t.defined() ? t.scalar_type() : ScalarType::Undefined);
  };
  const int64_t flags = op.residual + 2 * op.closed + 4 * op.transposed + 8 * activation;
  std::vector<int64_t> all = {std::bit_cast<int64_t>(op.scaling),
                              std::bit_cast<int64_t>(op.dropout_p),
                              seed,
                              flags,
                              dtype(op.lora_A),
                              dtype(op.lora_B),
                              dtype(op.lora_bias),
                              dtype(x)};
  all.insert(all.end(), x.sizes().begin(), x.sizes().end());
  return all;
}

struct LoraLinear : public torch::autograd::Function<LoraLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& A, const Tensor& B,
                        const std::optional<Tensor>& b, const Lora& op, const Gate& source) {
    const Call call = call_of(op, x);
    // X is kept for dA alone: with a frozen A, S is the only activation kept. A product is not
    // kept, but computed again.
    const bool keeps = A.requires_grad(), again = keeps && source.activation != 0;
    const bool casts = x.scalar_type() != call.compute;
    const Plain plain;
    const Tensor rows = as(flat(x), call.compute);
    const int64_t seed = op.dropout_p > 0.0 ? draw_seed() : 0;
    const Forward found = grasp::forward(op, rows, call.wide, seed);
    // The weight and the basis are saved so that a change in place is noticed. X itself is saved
    // for the same reason: below autograd a view of it has a version of its own.
    ctx->save_for_backward({!keeps  ? Tensor()
                            : again ? source.up
                            : casts ? rows
                                    : x,
                            found.S, found.A, found.B, op.weight, op.write_basis, A, B,
                            op.lora_bias, again ? source.gate : Tensor()});
    ctx->saved_data["numbers"] = packed(op, x, seed, again ? source.activation : 0);
    return shaped(found.y, x.sizes());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(6);
    if (!grads[0].defined()) return out;
    // Checkpointing runs the forward again to unpack them, which must be outside of the guards.
    const variable_list saved = ctx->get_saved_variables();
    {
      const at::AutoGradMode no_grad(false);
      const Plain plain;
      const std::vector<int64_t> numbers = ctx->saved_data["numbers"].toIntVector();
      Lora op;
      op.weight = saved[4], op.write_basis = saved[5];
      op.scaling = std::bit_cast<double>(numbers[0]);
      op.dropout_p = std::bit_cast<double>(numbers[1]);
      op.residual = numbers[3] & 1, op.closed = numbers[3] & 2, op.transposed = numbers[3] & 4;
      const auto dtype = [&](size_t i) { return static_cast<ScalarType>(numbers[i]); };
      const Tensor dy = flat(grads[0]), &A = saved[2];
      Tensor x = saved[0];
      if (saved[9].defined())
        x = as(product({saved[9], saved[0], numbers[3] >> 3}), dy.scalar_type());
      x = x.defined() ? flat(x) : stand_in(dy, A.size(1));
      const bool has_b = dtype(6) != ScalarType::Undefined;
      Gradients found = grasp::backward(
          op, dy, x, saved[1], A, saved[3], numbers[2], ctx->needs_input_grad(0),
          ctx->needs_input_grad(1), ctx->needs_input_grad(2), has_b && ctx->needs_input_grad(3));
      if (found.x.defined()) {
        out[0] = as(found.x, dtype(7)).view(at::IntArrayRef(numbers).slice(8));
      }
      if (found.A.defined()) found.A = as(found.A, dtype(4));
      if (found.B.defined()) found.B = as(found.B, dtype(5)).contiguous();
      if (found.b.defined()) found.b = as(found.b, dtype(6));
      out[1] = found.A, out[2] = found.B, out[3] = found.b;
    }
    if (at::GradMode::is_enabled()) {
      // Where X was not kept, or cast by autocast, nothing leads from the gradients back to it.
      const auto dtype = static_cast<ScalarType>(ctx->saved_data["numbers"].toIntVector()[7]);
      const bool keeps_x = saved[0].defined() && saved[0].scalar_type() == dtype;
      TORCH_CHECK(keeps_x || !ctx->needs_input_grad(0), kTwice);
      return refusing(out, {grads[0], saved[0], saved[6], saved[7], saved[8], saved[9]});
    }
    return out;
  }

  // With `create_graph` the gradients have a graph of their own, which leads to all that they
  // depend on, and refuses a second derivative on the way.
  static variable_list refusing(const variable_list& found, const variable_list& from);
};

struct Refusal : public torch::autograd::Function<Refusal> {
  static variable_list forward(AutogradContext*, at::TensorList found, at::TensorList) {
    return found.vec();
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, kTwice);
  }
};

inline variable_list LoraLinear::refusing(const variable_list& found, const variable_list& from) {
  variable_list given, leading, out(found.size());
  for (const Tensor& gradient : found) {
    if (gradient.defined()) given.push_back(gradient);
  }
  for (const Tensor& tensor : from) {
    if (tensor.defined()) leading.push_back(tensor);
  }
  const variable_list refused = Refusal::apply(at::TensorList(given), at::TensorList(leading));
  size_t next = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i].defined()) out[i] = refused[next++];
  }
  return out;
}

}  // namespace

// Return `Y[..., N]` from `X[..., K]`, with its derivative where one is asked for. `source` is X as
// a product, if it is one.
inline at::Tensor lora_linear(const Lora& op, const at::Tensor& x, const Gate& source) {
  const at::Tensor &A = op.lora_A, &B = op.lora_B, &b = op.lora_bias;
  const bool differentiated =
      at::GradMode::is_enabled() && (x.requires_grad() || A.requires_grad() || B.requires_grad() ||
                                     (b.defined() && b.requires_grad()));
  if (differentiated) {
    return LoraLinear::apply(x, A, B, b.defined() ? std::optional(b) : std::nullopt, op, source);
  }
  const Call call = call_of(op, x);
  const Plain plain;
  const int64_t seed = op.dropout_p > 0.0 ? draw_seed() : 0;
  return shaped(grasp::forward(op, as(flat(x), call.compute), call.wide, seed).y, x.sizes());
}

}  // namespace grasp
