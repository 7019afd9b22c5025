// What a launch of a kernel is told.
//
// Shapes: T tokens, C columns of Z, R LoRA rank, Q basis size, E rows of the skinny result.

#pragma once

#include <cstdint>

#include "device/host.h"

namespace grasp {

// A matrix whose rows and columns may stand any number of elements apart.
template <typename T>
struct Strided {
  T* data = nullptr;
  int64_t row = 0, column = 0;
};

// Dropout of Z: what `kept` in kernels/dropout.cuh says; no seed, no dropout.
struct Mask {
  const int64_t* seed = nullptr;  // [1]
  uint32_t threshold = 0;         // the probability of zero in units of 2⁻¹⁶
};

// One pass over Z[T, C], of bf16 or fp16 elements.
struct PassArguments {
  int64_t T, C;
  int R, Q, E;
  int cluster;  // blocks side by side along y that add their skinny results
  int steps;    // tiles of a block: of tokens in a sum over tokens, of columns in a down pass

  // Large operands, by tensor map on Hopper and by pointer before it.
  device::TensorMap z_map, left_map, factor_map;
  const void* z;
  int64_t z_stride;
  const void* left;  // L[R, ·], rows `left_stride` elements apart, a multiple of 8; zeros behind T
  int64_t left_stride;

  // F: given whole as [E, C] in a down pass; in a gradient pass its first R rows are the columns of
  // `factor[C, R]`, the others those of `basis[C, Q]`.
  Strided<const void> factor;
  Strided<const float> basis;  // float32, also for the shares

  float* sums;    // [splits, C, R]
  float* shares;  // [slabs · splits, Q, R], the part of the sums in the basis; null without one
  void* skinny;   // [E, T] if `finished`, else float32 [parts, E, T]
  bool finished;
  int n_scaled;  // finished rows before it come times `scaling`, the others times −1
  float scaling;

  Mask mask;
};

// Element types of a result.
enum class Element { float32, bf16, fp16 };

// The second half of a pass: partial results added in a fixed order, the projection of the sums.
struct FinishArguments {
  int64_t T, C;
  int R, Q, E;

  const float* parts;  // [n_parts, E, T], or null
  int n_parts;
  void* skinny;  // [E, T]
  int n_scaled;
  float scaling;
  int64_t skinny_blocks;  // of the grid
  int64_t shares_blocks;  // behind them; the last work on the sums

  const float* sums;  // [splits, C, R], or null
  int splits;
  const float* shares;  // [n_shares, Q, R], or null
  int n_shares;
  float* totals;               // [Q, R], the sum of the shares
  Strided<const float> basis;  // [C, Q]
  float sums_scaling;
  Strided<void> out;  // [C, R]
  Element out_element;
};

}  // namespace grasp
