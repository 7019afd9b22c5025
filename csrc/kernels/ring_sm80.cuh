// Tiles in flight, Ampere: every thread copies 16 bytes at a time, and all wait for each other.

#pragma once

#include "kernels/arguments.h"
#include "kernels/layout.cuh"

namespace grasp {

template <int kIndex>
class RingSm80 {
  static constexpr Shape S = SHAPES[kIndex];

 public:
  __device__ RingSm80(const PassArguments& a, const Steps<kIndex>& steps) : a_(a), steps_(steps) {
    for (int i = 0; i < S.stages - 1; ++i) load(i);
  }

  // The stage of step i, filled. The stage of the step before it, which all have left, is filled
  // anew with a later one.
  __device__ char* acquire(int i) {
    device::copy_async_wait<S.stages - 2>();
    device::named_barrier(1, S.threads());
    load(i + S.stages - 1);
    return shared_.stage(i);
  }
  __device__ void release(int) {}

 private:
  // One group of copies a step, of nothing behind the last, so that counting groups counts steps.
  __device__ void load(int i) {
    if (i < steps_.count) {
      char* stage = shared_.stage(i);
      const int64_t token = steps_.token_of(i), column = steps_.column_of(i);
      for (int block = 0; block < S.groups * S.blocks; ++block) {
        const int64_t first = column + kWide * block;
        copy(stage + block * kTokens * kRowBytes, kTokens, a_.z, a_.z_stride, token, first, a_.T,
             a_.C);
        if (!S.sums()) {
          copy(shared_.beside(stage) + block * S.E * kRowBytes, S.E, a_.factor.data, a_.factor.row,
               0, first, a_.E, a_.C);
        }
      }
      if (S.sums()) {
        copy(shared_.beside(stage), S.R, a_.left, a_.left_stride, 0, token, a_.R, a_.left_stride);
      }
    }
    device::copy_async_commit();
  }

  // A block of `rows` × 64 elements of a matrix [height, width] from (row, column) on.
  __device__ void copy(char* block, int rows, const void* matrix, int64_t stride, int64_t row,
                       int64_t column, int64_t height, int64_t width) {
    const auto* elements = static_cast<const uint16_t*>(matrix);
    for (int unit = threadIdx.x; unit < rows * 8; unit += S.threads()) {
      const int64_t r = row + unit / 8, c = column + unit % 8 * 8;
      const bool inside = r < height && c < width;
      device::copy_async_16(block + chunk_offset(unit / 8, unit % 8),
                            inside ? elements + r * stride + c : elements, inside);
    }
  }

  const PassArguments& a_;
  const Steps<kIndex>& steps_;
  Shared<kIndex> shared_;
};

}  // namespace grasp
