// What the operators refuse, each with one sentence.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <optional>
#include <string>
#include <vector>

#include "kernels/arguments.h"
#include "kernels/shapes.h"
#include "refuse.h"

namespace grasp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text(const std::vector<int64_t>& sizes) {
  std::string made = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    made += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  }
  return made + "]";
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

inline void check_matrix(const char* name, const Tensor& tensor) {
  GRASP_CHECK(tensor.dim() == 2, name, " has ", tensor.dim(),
              " dimensions; the kernels take matrices.");
}

inline void check_shape(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  GRASP_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
              " has shape ", text(sizes_of(tensor)), ", expected ", text({rows, columns}), ".");
}

inline void check_same_type(const char* name, const Tensor& tensor, const Tensor& z) {
  GRASP_CHECK(tensor.scalar_type() == z.scalar_type(), name,
              " has another dtype than z; cast one.");
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& z) {
  GRASP_CHECK(tensor.is_cuda() == z.is_cuda() && tensor.get_device_index() == z.get_device_index(),
              name, " is on another device than z; move one.");
}

inline void check_z(const Tensor& z) {
  check_matrix("z", z);
  GRASP_CHECK(z.scalar_type() == ScalarType::BFloat16 || z.scalar_type() == ScalarType::Half,
              "z must be bfloat16 or float16; use another backend for other dtypes.");
  GRASP_CHECK(z.size(1) > 0 && z.size(1) % 8 == 0, "z has ", z.size(1),
              " columns, which is no multiple of 8; use another backend.");
  GRASP_CHECK(z.size(0) < INT32_MAX && z.size(1) < INT32_MAX, "z has shape ", text(sizes_of(z)),
              "; the copy engine counts to 2³¹.");
}

inline void check_skinny(int64_t R, int64_t E) {
  GRASP_CHECK(R >= 1, "the rank is 0; a LoRA layer needs a rank of at least 1.");
  GRASP_CHECK(E <= kMaxSkinny, "R + Q is ", E, " but the kernels take up to ", kMaxSkinny,
              "; use another backend.");
}

inline void check_mask(const std::optional<Tensor>& seed, int64_t threshold, const Tensor& z) {
  GRASP_CHECK(0 <= threshold && threshold <= 65536, "the dropout threshold is ", threshold,
              "; it counts in units of 2⁻¹⁶, from 0 to 65536.");
  if (!seed) return;
  GRASP_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
              "seed must be one int64.");
  check_same_device("seed", *seed, z);
}

// Last, so that everything else is checked without a GPU too.
inline void check_device(const Tensor& z) {
  GRASP_CHECK(z.is_cuda() == (std::string(device::kDeviceType) == "cuda"), "z is on ",
              z.is_cuda() ? "cuda" : "cpu", " but these kernels were built for ",
              device::kDeviceType, "; use another backend there.");
}

}  // namespace grasp
