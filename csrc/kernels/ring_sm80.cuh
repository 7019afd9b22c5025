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
#pragma unroll
      for (int block = 0; block < S.groups * S.blocks; ++block) {
        const int64_t first = column + kWide * block;
        copy<kTokens>(stage + block * kTokens * kRowBytes, a_.z, a_.z_stride, token, first, a_.T,
                      a_.C);
        if constexpr (!S.sums()) {
          copy<S.E>(shared_.beside(stage) + block * S.E * kRowBytes, a_.factor.data, a_.factor.row,
                    0, first, a_.E, a_.C);
        }
      }
      if constexpr (S.sums()) {
        copy<S.R>(shared_.beside(stage), a_.left, a_.left_stride, 0, token, a_.R, a_.left_stride);
      }
    }
    device::copy_async_commit();
  }

  // A block of kRows × 64 elements of a matrix [height, width] from (row, column) on. A thread goes
  // down its column of chunks in steps that the swizzle repeats after, one addition each.
  template <int kRows>
  __device__ void copy(char* block, const void* matrix, int64_t stride, int64_t row, int64_t column,
                       int64_t height, int64_t width) {
    constexpr int kStep = S.threads() / 8;
    const int first = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const int64_t c = column + 8 * chunk;
    const int rows = c >= width ? 0 : static_cast<int>(min(height - row, int64_t(kRows)));
    const uint16_t* from = static_cast<const uint16_t*>(matrix) + (row + first) * stride + c;
    char* to = block + chunk_offset(first, chunk);
#pragma unroll
    for (int r = 0; r < kRows; r += kStep) {
      if (kRows % kStep == 0 || first + r < kRows) {
        device::copy_async_16(to + r * kRowBytes, from + r * stride, first + r < rows);
      }
    }
  }

  const PassArguments& a_;
  const Steps<kIndex>& steps_;
  Shared<kIndex> shared_;
};

}  // namespace grasp
