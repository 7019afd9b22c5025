// The operators that Python sees: checks, plans, launches. torch's stable ABI, so that one build
// serves every torch from 2.10 on.
//
// Shapes: T tokens, C columns of Z, R LoRA rank, Q basis size, E rows of the skinny result.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "kernels/finish.h"
#include "plan.h"

namespace grasp {
namespace {

bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::fp16;
    default:
      refuse("out must be float32, bfloat16 or float16.");
  }
}

template <typename T>
Strided<T> strided(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
}

// Whether 16 bytes can be read from every eighth element of every row.
bool readable(const Tensor& matrix) {
  const bool rows = matrix.size(0) == 1 || (matrix.stride(0) > 0 && matrix.stride(0) % 8 == 0);
  return rows && matrix.stride(1) == 1 && reinterpret_cast<uintptr_t>(matrix.data_ptr()) % 16 == 0;
}

// The matrix itself, or a copy whose rows are readable.
Tensor as_readable(const Tensor& matrix) {
  if (readable(matrix)) return matrix;
  Tensor made = torch::stable::new_empty(matrix, sizes_of(matrix));
  return torch::stable::copy_(made, matrix);
}

// L[R, T] with rows of a multiple of eight elements, zeros behind T.
Tensor padded_rows(const Tensor& left) {
  const int64_t missing = -left.size(1) & 7;
  return as_readable(missing == 0 ? left : torch::stable::pad(left, {0, missing}));
}

int64_t row_stride(const Tensor& matrix) {
  return matrix.size(0) == 1 ? matrix.size(1) : matrix.stride(0);
}

device::TensorMap tensor_map(const Tensor& matrix, int box_rows) {
  return device::tensor_map(matrix.data_ptr(), matrix.size(0), matrix.size(1),
                            2 * row_stride(matrix), box_rows, is_bf16(matrix));
}

Tensor new_float(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// What all passes are told of Z.
PassArguments arguments_for(const Plan& plan, const Tensor& z, const std::optional<Tensor>& seed,
                            int64_t threshold) {
  PassArguments a = {};
  a.T = z.size(0), a.C = z.size(1);
  a.steps = plan.steps, a.cluster = plan.grid.cluster;
  a.z = z.data_ptr(), a.z_stride = row_stride(z);
  if (plan.shape().arch == 90) a.z_map = tensor_map(z, kTokens);
  if (seed) a.mask = {static_cast<const int64_t*>(seed->data_ptr()), uint32_t(threshold)};
  return a;
}

// The skinny result [E, T] of a pass: parts in memory of their own if there are several.
struct Skinny {
  Tensor result;
  std::optional<Tensor> parts;

  Skinny(PassArguments& a, const Plan& plan, const Tensor& z, double scaling, int64_t n_scaled) {
    result = torch::stable::new_empty(z, {a.E, a.T});
    if (plan.parts > 1) parts = new_float(z, {plan.parts, a.E, a.T});
    a.skinny = (parts ? *parts : result).data_ptr();
    a.finished = !parts;
    a.scaling = static_cast<float>(scaling);
    a.n_scaled = static_cast<int>(n_scaled);
  }

  // The finish has to add the parts.
  void hand_to(FinishArguments& finish, const PassArguments& a, const Plan& plan) const {
    if (!parts) return;
    finish.parts = static_cast<const float*>(parts->data_ptr());
    finish.n_parts = plan.parts;
    finish.skinny = result.data_ptr();
    finish.n_scaled = a.n_scaled, finish.scaling = a.scaling;
    finish.skinny_blocks = finish_blocks(int64_t(a.E) * a.T, kFinishThreads);
  }
};

FinishArguments finish_for(const PassArguments& a) {
  FinishArguments finish = {};
  finish.T = a.T, finish.C = a.C;
  finish.R = a.R, finish.Q = a.Q, finish.E = a.E;
  return finish;
}

// The pass and, if it leaves partial results, the finish, on the current stream of torch; in two
// launches where the sums wait for what the basis has in all of them.
void run(const Plan& plan, const PassArguments& a, const FinishArguments& finish,
         const device::Properties& part, bool is_bf16) {
  const device::Stream stream = device::current_stream(part.device);
  device::launch(plan.kernel, plan.grid, stream, a);
  const auto launch_finish = [&](const FinishArguments& arguments, int64_t sums_blocks) {
    const int64_t blocks = arguments.skinny_blocks + arguments.shares_blocks + sums_blocks;
    const bool early = part.major >= 9;
    device::launch(finish_kernel_of(is_bf16), {blocks, 1, 1, kFinishThreads, 0, early}, stream,
                   arguments);
  };
  const int64_t sums_blocks = finish.sums == nullptr ? 0
                                                     : finish_blocks(a.C, kFinishColumns) *
                                                           finish_blocks(a.R, kFinishRanks);
  if (finish.shares == nullptr) return launch_finish(finish, sums_blocks);
  FinishArguments first = finish, second = finish;
  first.shares_blocks = finish_blocks(int64_t(a.Q) * a.R, kFinishThreads / 32);
  second.skinny_blocks = 0;
  launch_finish(first, 0);
  launch_finish(second, sums_blocks);
}

void check_sums(const Tensor& z, const Tensor& left, const Tensor& out,
                const std::optional<Tensor>& factor, const std::optional<Tensor>& basis) {
  check_z(z);
  check_matrix("left", left);
  const int64_t T = z.size(0), C = z.size(1), R = left.size(0);
  const int64_t Q = basis ? basis->size(basis->dim() - 1) : 0;
  check_skinny(R, R + Q);
  check_shape("left", left, R, T);
  check_same_type("left", left, z);
  check_same_device("left", left, z);
  check_shape("out", out, C, R);
  element_of(out);
  check_same_device("out", out, z);
  if (factor) {
    check_shape("factor", *factor, C, R);
    check_same_type("factor", *factor, z);
    check_same_device("factor", *factor, z);
  }
  if (basis) {
    check_shape("basis", *basis, C, Q);
    GRASP_CHECK(basis->scalar_type() == ScalarType::Float, "basis must be float32.");
    check_same_device("basis", *basis, z);
  }
}

// What a sum over tokens leaves for the finish, in float32.
struct Partial {
  Tensor sums;                   // [splits, C, R]
  std::optional<Tensor> shares;  // [1 + slabs · splits, Q, R], with a basis; the first for totals

  Partial(PassArguments& a, const Plan& plan, const Tensor& z) {
    sums = new_float(z, {plan.splits(), a.C, a.R});
    a.sums = static_cast<float*>(sums.data_ptr());
    if (a.basis.data == nullptr) return;
    shares = new_float(z, {1 + plan.grid.y * plan.splits(), a.Q, a.R});
    a.shares = static_cast<float*>(shares->data_ptr()) + a.Q * a.R;
  }

  void hand_to(FinishArguments& finish, const PassArguments& a, const Plan& plan) const {
    finish.sums = a.sums, finish.splits = static_cast<int>(plan.splits());
    finish.basis = a.basis;
    if (!shares) return;
    finish.shares = a.shares, finish.n_shares = static_cast<int>(plan.grid.y * plan.splits());
    finish.totals = static_cast<float*>(shares->data_ptr());
  }
};

// `out[C, R] = s (I − V Vᵀ) Z̃ᵀ Lᵀ`, and with a factor, from the same read of Z,
// `[s F | −V]ᵀ Zᵀ [E, T]`, where the second half is there if `project`; empty otherwise.
Tensor sums(const Tensor& z_given, const Tensor& left_given, Tensor out,
            std::optional<Tensor> factor, std::optional<Tensor> basis, bool project, double scaling,
            std::optional<Tensor> seed, int64_t threshold) {
  check_sums(z_given, left_given, out, factor, basis);
  check_mask(seed, threshold, z_given);
  check_device(z_given);
  const int R = static_cast<int>(left_given.size(0));
  const int Q = basis ? static_cast<int>(basis->size(1)) : 0;
  const int E = factor ? R + (project ? Q : 0) : 0;
  const int64_t T = z_given.size(0);
  if (T == 0) {
    torch::stable::zero_(out);
    return torch::stable::new_empty(z_given, {E, T});
  }

  const int device = z_given.get_device_index();
  const device::OnDevice guard(device);
  const device::Properties part = device::properties(device);
  const Kind kind = factor ? Kind::gradient : Kind::input;
  GRASP_CHECK(shape_for(kind, part.major, R, E) >= 0, "no kernel for compute capability ",
              part.major, ".x gives ", E, " skinny rows in the same read; ask for them with down.");
  const Tensor z = as_readable(z_given), left = padded_rows(left_given);
  const Plan plan = plan_sums(kind, part, T, z.size(1), R, E, is_bf16(z));
  PassArguments a = arguments_for(plan, z, seed, threshold);
  a.R = R, a.Q = Q, a.E = E;
  a.left = left.data_ptr(), a.left_stride = row_stride(left);
  if (plan.shape().arch == 90) a.left_map = tensor_map(left, plan.shape().R);
  if (factor) a.factor = strided<const void>(*factor);
  if (basis) a.basis = strided<const float>(*basis);

  const Partial partial(a, plan, z);
  FinishArguments finish = finish_for(a);
  partial.hand_to(finish, a, plan);
  finish.sums_scaling = static_cast<float>(scaling);
  finish.out = strided<void>(out), finish.out_element = element_of(out);
  std::optional<Skinny> skinny;
  if (factor) {
    skinny.emplace(a, plan, z, scaling, R);
    skinny->hand_to(finish, a, plan);
  }
  run(plan, a, finish, part, is_bf16(z));
  return skinny ? skinny->result : torch::stable::new_empty(z, {0, T});
}

// `[s F[:n] | −F[n:]] Z̃ᵀ [E, T]` for `F[E, C]`.
Tensor down(const Tensor& z_given, const Tensor& factor_given, double scaling, int64_t n_scaled,
            std::optional<Tensor> seed, int64_t threshold) {
  check_z(z_given);
  check_matrix("factor", factor_given);
  const int64_t T = z_given.size(0), C = z_given.size(1), E = factor_given.size(0);
  check_skinny(E, E);
  check_shape("factor", factor_given, E, C);
  check_same_type("factor", factor_given, z_given);
  check_same_device("factor", factor_given, z_given);
  check_mask(seed, threshold, z_given);
  check_device(z_given);

  if (T == 0) return torch::stable::new_empty(z_given, {E, T});
  const int device = z_given.get_device_index();
  const device::OnDevice guard(device);
  const Tensor z = as_readable(z_given), factor = as_readable(factor_given);
  const device::Properties part = device::properties(device);
  const Plan plan = plan_down(part, T, C, E, is_bf16(z));
  PassArguments a = arguments_for(plan, z, seed, threshold);
  a.E = E;
  a.factor = strided<const void>(factor);
  a.factor.row = row_stride(factor);
  if (plan.shape().arch == 90) a.factor_map = tensor_map(factor, plan.shape().E);
  const Skinny skinny(a, plan, z, scaling, n_scaled);
  FinishArguments finish = finish_for(a);
  skinny.hand_to(finish, a, plan);
  run(plan, a, finish, part, is_bf16(z));
  return skinny.result;
}

// How many partial results of E skinny rows a gradient pass over C columns leaves on a device of a
// compute capability; 0: it has no such pass.
int64_t skinny_parts(int64_t major, int64_t C, int64_t R, int64_t E) {
  return gradient_parts(static_cast<int>(major), C, static_cast<int>(R), static_cast<int>(E));
}

// Whether this build has code for a GPU.
bool runs_on_device(int64_t index) {
  const device::OnDevice guard(static_cast<int>(index));
  return runs_on(device::properties(static_cast<int>(index)));
}

// Whether this build runs on a CPU, as the tests' does.
bool emulated() { return std::string(device::kDeviceType) == "cpu"; }

}  // namespace
}  // namespace grasp

STABLE_TORCH_LIBRARY(grasp_kernels_cuda, library) {
  library.def(
      "sums(Tensor z, Tensor left, Tensor(a!) out, Tensor? factor, Tensor? basis, bool project, "
      "float scaling, Tensor? seed, int threshold) -> Tensor");
  library.def(
      "down(Tensor z, Tensor factor, float scaling, int n_scaled, Tensor? seed, int threshold) "
      "-> Tensor");
  library.def("skinny_parts(int major, int C, int R, int E) -> int");
  library.def("runs_on(int device) -> bool");
  library.def("emulated() -> bool");
}

// For every device, so that arguments are checked before the device is.
STABLE_TORCH_LIBRARY_IMPL(grasp_kernels_cuda, CompositeExplicitAutograd, library) {
  library.impl("sums", TORCH_BOX(&grasp::sums));
  library.impl("down", TORCH_BOX(&grasp::down));
  library.impl("skinny_parts", TORCH_BOX(&grasp::skinny_parts));
  library.impl("runs_on", TORCH_BOX(&grasp::runs_on_device));
  library.impl("emulated", TORCH_BOX(&grasp::emulated));
}
