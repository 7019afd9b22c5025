// The two products of a tile, Ampere: ldmatrix and mma.sync, a warp at a time.
//
// A warp of a group holds the rows of a result that it would hold of a warpgroup's product, 16 ·
// warp to 16 · warp + 15, so that what follows does not know which of the two made it.

#pragma once

#include "kernels/layout.cuh"

namespace grasp {

template <typename T>
struct ProductsSm80 {
  Place at;

  // acc[64 tokens, 8 kBlocks] += Z[64, 64] F[8 kBlocks, 64]ᵀ, both blocks with columns contiguous.
  template <int kBlocks>
  __device__ void skinny(float (&acc)[kBlocks][4], const char* z, const char* factor) const {
#pragma unroll
    for (int k = 0; k < kWide / 16; ++k) {
      uint32_t a[4];
      device::load_matrices(a, z + chunk_offset(16 * at.warp + at.lane % 16, 2 * k + at.lane / 16));
      multiply(acc, a, factor, k);
    }
  }

  // acc[64 columns, 8 kBlocks] += Z[64, 64]ᵀ L[8 kBlocks, 64]ᵀ, L with tokens contiguous.
  template <int kBlocks>
  __device__ void sums(float (&acc)[kBlocks][4], const char* z, const char* left) const {
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t a[4];
      const int token = 16 * k + 8 * (at.lane / 16) + at.lane % 8;
      device::load_matrices_transposed(a, z + chunk_offset(token, 2 * at.warp + at.lane / 8 % 2));
      multiply(acc, a, left, k);
    }
  }

  // Ampere's products are through when they return.
  template <int kBlocks>
  __device__ void hold(float (&)[kBlocks][4]) const {}
  __device__ void begin() const {}
  __device__ void commit() const {}
  template <int kPending>
  __device__ void wait() const {}

 private:
  // acc += a B[8 kBlocks, columns 16k to 16k + 15]ᵀ
  template <int kBlocks>
  __device__ void multiply(float (&acc)[kBlocks][4], const uint32_t (&a)[4], const char* b,
                           int k) const {
#pragma unroll
    for (int j = 0; j < kBlocks; j += 2) {
      uint32_t pair[4];
      device::load_matrices(pair, b + chunk_offset(8 * j + 8 * (at.lane / 16) + at.lane % 8,
                                                   2 * k + at.lane / 8 % 2));
      device::mma<T>(acc[j], a, pair[0], pair[1]);
      device::mma<T>(acc[j + 1], a, pair[2], pair[3]);
    }
  }
};

}  // namespace grasp
