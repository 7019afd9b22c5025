// All kernels of one kind, for kernels/table.h.

#pragma once

#include <array>
#include <utility>

#include "kernels/pass.cuh"
#include "kernels/table.h"

namespace grasp {

template <typename T, Kind kKind, int kIndex>
constexpr PassKernel instance() {
  if constexpr (SHAPES[kIndex].kind == kKind) {
    return pass_kernel<T, kIndex>;
  } else {
    return nullptr;
  }
}

template <typename T, Kind kKind, int... kIndex>
PassKernel instance_at(int index, std::integer_sequence<int, kIndex...>) {
  static constexpr std::array<PassKernel, kShapes> kAll = {instance<T, kKind, kIndex>()...};
  return kAll.at(index);
}

template <Kind kKind>
PassKernel kernel_of_kind(int index, bool is_bf16) {
  constexpr auto kIndices = std::make_integer_sequence<int, kShapes>();
  return is_bf16 ? instance_at<device::bf16, kKind>(index, kIndices)
                 : instance_at<device::fp16, kKind>(index, kIndices);
}

}  // namespace grasp
