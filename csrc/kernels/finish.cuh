// The second half of the passes: partial results added in a fixed order, the sums projected.
//
//   skinny[E, T] = Σ parts,   out[C, R] = s (I − V Vᵀ) Σ sums   with   Vᵀ Σ sums = Σ shares
//
// It is set up while the pass before it ends. One launch for both: the first blocks of the grid
// work on the skinny result, the others on 32 columns of the sums each. No atomics, so that a rerun
// gives the same bits. Shapes: T tokens, C columns of Z, R LoRA rank, Q basis size, E rows of the
// skinny result.

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

// Vᵀ Σ sums [Q, R] in shared memory; where it has few elements, several threads share one.
__device__ inline const float* total_shares(const FinishArguments& a) {
  float* shared = reinterpret_cast<float*>(device::shared_memory());
  const int size = a.Q * a.R, threads = kFinishThreads / size;
  if (threads < 2) {
    for (int at = threadIdx.x; at < size; at += kFinishThreads) {
      shared[at] = add(a.shares + at, size, 0, a.n_shares, 1);
    }
    device::named_barrier(1, kFinishThreads);
    return shared;
  }
  const int at = threadIdx.x % size, part = threadIdx.x / size;
  if (part < threads) shared[threadIdx.x] = add(a.shares + at, size, part, a.n_shares, threads);
  device::named_barrier(1, kFinishThreads);
  const float sum = part == 0 ? add(shared + at, size, 0, threads, 1) : 0.0f;
  device::named_barrier(1, kFinishThreads);
  if (part == 0) shared[at] = sum;
  device::named_barrier(1, kFinishThreads);
  return shared;
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

__device__ inline void finish_sums(const FinishArguments& a) {
  const float* shares = a.shares == nullptr ? nullptr : total_shares(a);
  const int64_t first = (blockIdx.x - a.skinny_blocks) * kFinishColumns;
  for (int unit = threadIdx.x; unit < kFinishColumns * a.R; unit += kFinishThreads) {
    const int64_t c = first + unit / a.R;
    const int r = unit % a.R;
    if (c >= a.C) return;
    float value = add(a.sums + c * a.R + r, a.C * a.R, 0, a.splits, 1);
    if (shares != nullptr) {
      for (int q = 0; q < a.Q; ++q) {
        value -= a.basis.data[c * a.basis.row + q * a.basis.column] * shares[q * a.R + r];
      }
    }
    write_element(a.out.data, a.out_element, c * a.out.row + r * a.out.column,
                  a.sums_scaling * value);
  }
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ FinishArguments a) {
  device::wait_for_previous();
  if (blockIdx.x < a.skinny_blocks) {
    finish_skinny<T>(a);
  } else {
    finish_sums(a);
  }
}

}  // namespace grasp
