// The second version of csrc/device/primitives.cuh: the same functions on the emulator.
//
// They follow the PTX ISA where it says what happens. Where it leaves a choice the seed makes it,
// and what it leaves undefined is NaN or an exception.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "tensor_map.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

// CUDA has these outside of any namespace.
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// Of the thread that runs; the scheduler sets them.
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace grasp::device {

using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;
using Barrier = uint64_t;

constexpr bool made_here(int) { return true; }

// Where shared memory begins among shared addresses. The system keeps the first kilobyte on Hopper.
constexpr uint32_t kSharedWindow = 1024;

uint32_t shared_address(const void* shared);
char* shared_memory();

// ---- warps and blocks -------------------------------------------------------------------------

void warp_sync();
float shuffle_xor(float value, int mask);
void named_barrier(int id, int threads);

namespace erased {
void give_registers(int count);
void take_registers(int count);
}  // namespace erased

template <int kRegisters>
void give_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  erased::give_registers(kRegisters);
}

template <int kRegisters>
void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  erased::take_registers(kRegisters);
}

inline uint64_t multiply_wide(uint32_t a, uint32_t b) { return uint64_t(a) * b; }

// Launches are over when they return.
inline void release_next() {}
inline void wait_for_previous() {}

[[noreturn]] void stop();

// ---- copies of Ampere -------------------------------------------------------------------------

namespace erased {
void copy_async_wait(int pending);
}

void copy_async_16(void* shared, const void* global, bool valid);
void copy_async_commit();

template <int kPending>
void copy_async_wait() {
  erased::copy_async_wait(kPending);
}

// ---- products of Ampere -----------------------------------------------------------------------

namespace erased {
void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16);
}

void load_matrices(uint32_t (&out)[4], const void* shared);
void load_matrices_transposed(uint32_t (&out)[4], const void* shared);

template <typename T>
void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  erased::mma(acc, a, b0, b1, std::is_same_v<T, bf16>);
}

// ---- barriers in shared memory, Hopper --------------------------------------------------------

void barrier_init(Barrier* barrier, int arrivals);
void barrier_arrive(Barrier* barrier);
void barrier_arrive_expect(Barrier* barrier, int bytes);
void barrier_arrive_remote(Barrier* barrier, int rank);
void barrier_wait(Barrier* barrier, int parity);

// Threads of the emulator share one view of memory: fences have nothing to order.
inline void barrier_init_fence() {}
inline void fence_async_proxy() {}

// ---- clusters ---------------------------------------------------------------------------------

void cluster_sync();
int cluster_rank();
float4 load_remote(const float* shared, int rank);

// ---- the copy engine, Hopper ------------------------------------------------------------------

inline void prefetch(const TensorMap*) {}
void copy_box(void* shared, const TensorMap* map, Barrier* barrier, int column, int row);

// ---- products of Hopper -----------------------------------------------------------------------

struct Operand {
  uint64_t bits;  // of the descriptor of PTX, so that arithmetic on it goes wrong here as there
};

namespace erased {

struct Product {
  uint64_t a, b;
  int blocks;  // of eight columns
  bool is_bf16, transposed, add;
};

void wgmma(float (*acc)[4], const Product& product);
void wgmma_wait(int pending);

}  // namespace erased

Operand operand(const void* shared);

inline Operand advance(Operand from, int bytes) { return {from.bits + (bytes >> 4)}; }

void wgmma_fence();
void wgmma_commit();

template <int kPending>
void wgmma_wait() {
  erased::wgmma_wait(kPending);
}

inline void wgmma_hold(float (&)[4]) {}

template <typename T, bool kTransposed, int kBlocks>
void wgmma(float (*acc)[4], Operand a, Operand b, bool add) {
  static_assert(kBlocks == 2 || kBlocks == 4 || kBlocks == 8);
  erased::wgmma(acc, {a.bits, b.bits, kBlocks, std::is_same_v<T, bf16>, kTransposed, add});
}

}  // namespace grasp::device
