// The two products of a tile, Hopper: wgmma, both operands from shared memory.
//
// The same bytes of Z serve both: as rows of tokens for the skinny product, and as rows of columns,
// which is the transposed reading that two-byte operands allow, for the sum over tokens.

#pragma once

#include "kernels/layout.cuh"

namespace grasp {

template <typename T>
struct ProductsSm90 {
  Place at;

  // acc[64 tokens, 8 kBlocks] += Z[64, 64] F[8 kBlocks, 64]ᵀ, both blocks with columns contiguous.
  template <int kBlocks>
  __device__ void skinny(float (&acc)[kBlocks][4], const char* z, const char* factor) const {
    const device::Operand a = device::operand(z), b = device::operand(factor);
#pragma unroll
    for (int k = 0; k < kWide / 16; ++k) {
      multiply<false, kBlocks>(acc, device::advance(a, 32 * k), device::advance(b, 32 * k));
    }
  }

  // acc[64 columns, 8 kBlocks] += Z[64, 64]ᵀ L[8 kBlocks, 64]ᵀ, L with tokens contiguous.
  template <int kBlocks>
  __device__ void sums(float (&acc)[kBlocks][4], const char* z, const char* left) const {
    const device::Operand a = device::operand(z), b = device::operand(left);
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      multiply<true, kBlocks>(acc, device::advance(a, 16 * kRowBytes * k),
                              device::advance(b, 32 * k));
    }
  }

  // Around products under way: accumulators stay where they are.
  template <int kBlocks>
  __device__ void hold(float (&acc)[kBlocks][4]) const {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) device::wgmma_hold(acc[j]);
  }
  __device__ void begin() const { device::wgmma_fence(); }
  __device__ void commit() const { device::wgmma_commit(); }
  template <int kPending>
  __device__ void wait() const {
    device::wgmma_wait<kPending>();
  }

 private:
  // Wide results in pieces of 64, 32 and 16 columns, 1024 bytes of b for every eight.
  template <bool kTransposed, int kBlocks>
  __device__ void multiply(float (*acc)[4], device::Operand a, device::Operand b) const {
    constexpr int kPiece = kBlocks >= 8 ? 8 : kBlocks >= 4 ? 4 : 2;
    device::wgmma<T, kTransposed, kPiece>(acc, a, b, true);
    if constexpr (kBlocks > kPiece) {
      multiply<kTransposed, kBlocks - kPiece>(acc + kPiece, a,
                                              device::advance(b, 8 * kRowBytes * kPiece));
    }
  }
};

}  // namespace grasp
