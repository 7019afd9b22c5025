// The second half of the passes: partial results added in a fixed order, the sums projected.
//
//   skinny[E, T] = Σ parts,   out[C, R] = s (I − V Vᵀ) Σ sums   with   Vᵀ Σ sums = Σ shares
//
// It is set up while the pass before it ends. The first blocks of the grid work on the skinny
// result, the next on the totals of the shares, the others on the sums, an element a thread: what
// it takes is the latency of memory, so nothing waits in line. Sums that are projected need the
// totals, so they come in a second launch. No atomics, so that a rerun gives the same bits.
// Shapes: T tokens, C columns of Z, R LoRA rank, Q basis size, E rows of the skinny result.

#pragma once

#include "device/primitives.cuh"
#include "kernels/arguments.h"
#include "kernels/finish.h"

namespace grasp {

// Every `step`-th of `count` numbers, `stride` apart, from number `first` on.
__device__ __forceinline__ float add(const float* numbers, int64_t stride, int first, int count,
                                     int step) {
  float sum = 0.0f;
#pragma unroll 8  // one after the other, each load would wait for memory
  for (int i = first; i < count; i += step) sum += numbers[i * stride];
  return sum;
}

template <typename T>
__device__ void finish_skinny(const FinishArguments& a) {
  const int64_t at = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x, size = a.E * a.T;
  if (at >= size) return;
  const float scale = at / a.T < a.n_scaled ? a.scaling : -1.0f;
  static_cast<T*>(a.skinny)[at] = T(scale * add(a.parts + at, size, 0, a.n_parts, 1));
}

// Vᵀ Σ sums [Q, R], one element a warp.
__device__ inline void total_shares(const FinishArguments& a, int64_t block) {
  const int64_t at = block * (kFinishThreads / 32) + threadIdx.x / 32, size = int64_t(a.Q) * a.R;
  if (at >= size) return;
  const int lane = threadIdx.x % 32;
  float sum = add(a.shares + at, size, lane, a.n_shares, 32);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) sum += device::shuffle_xor(sum, lanes);
  if (lane == 0) a.totals[at] = sum;
}

__device__ inline void write_element(void* out, Element element, int64_t at, float value) {
  if (element == Element::float32) {
    static_cast<float*>(out)[at] = value;
  } else if (element == Element::bf16) {
    static_cast<device::bf16*>(out)[at] = device::bf16(value);
  } else {
    static_cast<device::fp16*>(out)[at] = device::fp16(value);
  }
}

// 32 columns by eight ranks. Neighbouring threads are neighbours in `out`; what a warp leaves of
// the sectors that it reads, the other warps find in the L1.
__device__ inline void finish_sums(const FinishArguments& a, int64_t block) {
  const int64_t across = (a.C + kFinishColumns - 1) / kFinishColumns;
  const bool down = a.out.row <= a.out.column;
  const int thread = threadIdx.x;
  const int64_t c =
      block % across * kFinishColumns + (down ? thread % kFinishColumns : thread / kFinishRanks);
  const int r = static_cast<int>(block / across) * kFinishRanks +
                (down ? thread / kFinishColumns : thread % kFinishRanks);
  if (c >= a.C || r >= a.R) return;
  float value = add(a.sums + c * a.R + r, a.C * a.R, 0, a.splits, 1);
  if (a.shares != nullptr) {
#pragma unroll 4
    for (int q = 0; q < a.Q; ++q) {
      value -= a.basis.data[c * a.basis.row + q * a.basis.column] * a.totals[q * a.R + r];
    }
  }
  write_element(a.out.data, a.out_element, c * a.out.row + r * a.out.column,
                a.sums_scaling * value);
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ FinishArguments a) {
  device::wait_for_previous();
  const int64_t block = blockIdx.x;
  if (block < a.skinny_blocks) {
    finish_skinny<T>(a);
  } else if (block < a.skinny_blocks + a.shares_blocks) {
    total_shares(a, block - a.skinny_blocks);
  } else {
    finish_sums(a, block - a.skinny_blocks - a.shares_blocks);
  }
}

}  // namespace grasp
