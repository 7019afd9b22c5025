// The dropout mask, regenerated from a seed: the one that the Triton kernels draw.

#pragma once

#include "device/primitives.cuh"

namespace grasp {

// Philox-4x32-10 (Salmon et al., SC 2011) of a 64-bit counter.
__device__ __forceinline__ void philox(uint64_t seed, uint64_t counter, uint32_t (&out)[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = device::multiply_wide(0xD2511F53u, c0);
    const uint64_t odd = device::multiply_wide(0xCD9E8D57u, c2);
    c0 = static_cast<uint32_t>(odd >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(even >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(odd);
    c3 = static_cast<uint32_t>(even);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// Zeros among eight neighbouring two-byte elements: one counter gives eight 16-bit numbers, and an
// element stays where its number is at least the threshold.
__device__ __forceinline__ uint4 dropped(uint4 elements, uint64_t seed, uint64_t counter,
                                         uint32_t threshold) {
  uint32_t random[4];
  philox(seed, counter, random);
  const auto kept = [threshold](uint32_t word, uint32_t numbers) {
    const uint32_t low = (numbers & 0xffffu) >= threshold ? 0x0000ffffu : 0u;
    const uint32_t high = (numbers >> 16) >= threshold ? 0xffff0000u : 0u;
    return word & (low | high);
  };
  elements.x = kept(elements.x, random[0]);
  elements.y = kept(elements.y, random[2]);  // the order in which Triton joins words
  elements.z = kept(elements.z, random[1]);
  elements.w = kept(elements.w, random[3]);
  return elements;
}

}  // namespace grasp
