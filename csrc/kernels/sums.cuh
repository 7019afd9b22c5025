// What a block leaves of its sum over tokens: the sum itself, [columns, R], and the part that the
// basis has in it, [Q, R], in float32. To project the whole sum takes all columns, so that waits
// for the finish.

#pragma once

#include "kernels/arguments.h"
#include "kernels/layout.cuh"

namespace grasp {

template <int kIndex>
using Sums = float[SHAPES[kIndex].blocks][SHAPES[kIndex].R / 8][4];

// The column of Z of row n / 2 of a thread in block m of its group.
template <int kIndex>
__device__ __forceinline__ int64_t column_of(const Place& at, int64_t column, int m, int half) {
  constexpr Shape S = SHAPES[kIndex];
  return column + kWide * (at.group * S.blocks + m) + 16 * at.warp + at.lane / 4 + 8 * half;
}

template <int kIndex>
__device__ void write_sums(const PassArguments& a, const Place& at, int64_t column,
                           const Sums<kIndex>& acc) {
  constexpr Shape S = SHAPES[kIndex];
  float* sums = a.sums + int64_t(blockIdx.x) * a.C * a.R;
#pragma unroll
  for (int m = 0; m < S.blocks; ++m) {
#pragma unroll
    for (int j = 0; j < S.R / 8; ++j) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {  // four lanes fill a sector of 32 bytes between them
        const int64_t c = column_of<kIndex>(at, column, m, n / 2);
        const int r = 8 * j + at.lane % 4 * 2 + n % 2;
        if (c < a.C && r < a.R) sums[c * a.R + r] = acc[m][j][n];
      }
    }
  }
}

// One column of the basis at a time: lanes, then warps, in a fixed order.
template <int kIndex>
__device__ void write_shares(const PassArguments& a, const Shared<kIndex>& shared, const Place& at,
                             int64_t column, const Sums<kIndex>& acc) {
  constexpr Shape S = SHAPES[kIndex];
  constexpr int kWarps = S.consumers() / 32;
  float* scratch = reinterpret_cast<float*>(shared.base);  // the ring, which is drained
  const int64_t program = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  device::named_barrier(1, S.consumers());
  for (int q = 0; q < a.Q; ++q) {
    float basis[S.blocks][2];
#pragma unroll
    for (int m = 0; m < S.blocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t c = column_of<kIndex>(at, column, m, half);
        basis[m][half] = c < a.C ? a.basis.data[c * a.basis.row + q * a.basis.column] : 0.0f;
      }
    }
    float* own = scratch + (q % 2 * kWarps + at.thread / 32) * S.R;
#pragma unroll
    for (int j = 0; j < S.R / 8; ++j) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        float sum = 0.0f;
#pragma unroll
        for (int m = 0; m < S.blocks; ++m) {
          sum += basis[m][0] * acc[m][j][odd];
          sum += basis[m][1] * acc[m][j][2 + odd];
        }
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += device::shuffle_xor(sum, lanes);
        if (at.lane < 4) own[8 * j + at.lane * 2 + odd] = sum;
      }
    }
    device::named_barrier(1, S.consumers());  // two halves of scratch, so one barrier a column
    if (at.thread < a.R) {
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) {
        sum += scratch[(q % 2 * kWarps + warp) * S.R + at.thread];
      }
      a.shares[(program * a.Q + q) * a.R + at.thread] = sum;
    }
  }
}

}  // namespace grasp
