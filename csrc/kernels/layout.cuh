// Where things lie in shared memory.
//
// Every operand of a product is made of blocks of 64 columns: rows of 128 bytes one after the
// other, whose eight chunks of 16 bytes are permuted by the row, so that neither eight rows of one
// chunk nor one row of eight collide in the banks. It is the 128-byte swizzle of the copy engine.

#pragma once

#include "device/primitives.cuh"
#include "kernels/arguments.h"
#include "kernels/shapes.h"

namespace grasp {

// The byte offset of a chunk of a row in a block.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// The place of a thread in the work of a block.
struct Place {
  int thread = threadIdx.x;
  int group = thread / kGroup;        // its columns
  int warp = (thread % kGroup) / 32;  // in the group: rows 16 · warp of every product
  int lane = thread % 32;
};

template <int kIndex>
struct Shared {
  static constexpr Shape S = SHAPES[kIndex];
  static constexpr int kBuffers = S.skinny() ? S.buffers : 1;
  char* base = device::shared_memory();

  __device__ char* stage(int i) const { return base + (i % S.stages) * S.stage_bytes(); }
  // L, or F of the tile.
  __device__ char* beside(char* stage) const { return stage + S.z_bytes(); }
  __device__ char* factor() const { return base + S.factor_offset(); }
  __device__ float* skinny(int i) const {
    return reinterpret_cast<float*>(base + S.skinny_offset()) + (i % kBuffers) * S.skinny_floats();
  }
  __device__ device::Barrier* barrier(int i) const {
    return reinterpret_cast<device::Barrier*>(base + S.barrier_offset()) + i;
  }
};

// The tile that a block works on in step i.
template <int kIndex>
struct Steps {
  static constexpr Shape S = SHAPES[kIndex];
  int64_t token, column;
  int count;

  __device__ explicit Steps(const PassArguments& a) {
    const int64_t x = blockIdx.x, y = blockIdx.y;
    token = kTokens * (S.along_tokens() ? x * a.steps : x);
    column = S.columns() * (S.along_tokens() ? y : y * a.steps);
    const int64_t left = S.along_tokens() ? (a.T - token + kTokens - 1) / kTokens
                                          : (a.C - column + S.columns() - 1) / S.columns();
    count = static_cast<int>(left < 0 ? 0 : left < a.steps ? left : a.steps);
  }
  __device__ int64_t token_of(int i) const { return token + (S.along_tokens() ? kTokens * i : 0); }
  __device__ int64_t column_of(int i) const {
    return column + (S.along_tokens() ? 0 : int64_t(S.columns()) * i);
  }
};

}  // namespace grasp
