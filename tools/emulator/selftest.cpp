// Small kernels for tests/ops/test_emulator.py, one for each thing that must be done or refused.

#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/host.h"
#include "device/primitives.cuh"

namespace grasp {
namespace {

using device::Barrier;
using device::bf16;
using device::fp16;
using device::TensorMap;

constexpr int kShared = 64 << 10;

template <typename T>
std::vector<T> random_matrix(int rows, int columns, uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::vector<T> matrix(rows * columns);
  for (T& element : matrix) element = T(static_cast<float>(generator() % 17) / 8 - 1);
  return matrix;
}

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("wrong: " + what);
}

// Sums of eighths are exact in float32, so results must be equal.
void expect_equal(const std::vector<float>& found, const std::vector<float>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    expect(found[i] == expected[i], "element " + std::to_string(i) + " is " +
                                        std::to_string(found[i]) + ", not " +
                                        std::to_string(expected[i]));
  }
}

template <typename Arguments>
void run(void (*kernel)(Arguments), Arguments argument, int threads = 32, int blocks = 1,
         int shared = kShared) {
  device::launch(kernel, {2, blocks, blocks, threads, shared}, nullptr, argument);
}

// Element (line, column) of lines of 128 bytes in the 128-byte swizzle.
template <typename T>
T* swizzled(char* base, int line, int column) {
  const int at = line * 128 + column * 2;
  return reinterpret_cast<T*>(base + (at ^ (at >> 7 & 7) << 4));
}

// ---- boxes and barriers -----------------------------------------------------------------------

struct Boxes {
  TensorMap map;
  float* out;    // [2, boxes, 32, 64]
  int bytes;     // announced for a box
  int arrivals;  // at the barriers of full slots
};

constexpr int kBoxes = 7, kSlots = 2, kBoxBytes = 32 * 128;

// The first warp fills a ring with boxes along a row of them; the second writes them out.
__global__ void __launch_bounds__(64) ring(const __grid_constant__ Boxes boxes) {
  char* slots = device::shared_memory();
  auto* full = reinterpret_cast<Barrier*>(slots + kSlots * kBoxBytes);
  Barrier* empty = full + kSlots;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      device::barrier_init(full + slot, boxes.arrivals);
      device::barrier_init(empty + slot, 32);
    }
    device::barrier_init_fence();
  }
  device::named_barrier(1, 64);
  for (int i = 0; i < kBoxes; ++i) {
    const int slot = i % kSlots, parity = i / kSlots % 2;
    if (threadIdx.x == 0) {
      device::barrier_wait(empty + slot, parity ^ 1);
      device::barrier_arrive_expect(full + slot, boxes.bytes);
      device::copy_box(slots + slot * kBoxBytes, &boxes.map, full + slot, 64 * i, 20 * blockIdx.x);
    } else if (threadIdx.x >= 32) {
      device::barrier_wait(full + slot, parity);
      float* out = boxes.out + (blockIdx.x * kBoxes + i) * 32 * 64;
      for (int e = threadIdx.x - 32; e < 32 * 64; e += 32) {
        out[e] = *swizzled<bf16>(slots + slot * kBoxBytes, e / 64, e % 64);
      }
      device::barrier_arrive(empty + slot);
    }
  }
}

void copy_boxes(int bytes, int arrivals) {
  constexpr int kRows = 41, kColumns = 6 * 64 - 13, kStride = 6 * 64;
  const auto matrix = random_matrix<bf16>(kRows, kStride, 1);
  std::vector<float> out(2 * kBoxes * 32 * 64), expected;
  for (int x = 0; x < 2; ++x) {
    for (int i = 0; i < kBoxes; ++i) {
      for (int e = 0; e < 32 * 64; ++e) {
        const int row = 20 * x + e / 64, column = 64 * i + e % 64;
        const bool inside = row < kRows && column < kColumns;
        expected.push_back(inside ? float(matrix[row * kStride + column]) : 0.0f);
      }
    }
  }
  const TensorMap map = device::tensor_map(matrix.data(), kRows, kColumns, kStride * 2, 32, true);
  run(ring, {map, out.data(), bytes, arrivals}, 64);
  expect_equal(out, expected);
}

// ---- mma --------------------------------------------------------------------------------------

template <typename T>
struct Factors {
  const T* a;
  const T* b;
  float* out;
  int mode = 0;
};

// out[16, 16] = a[16, 16] b[16, 16]ᵀ; if mode is 1, a and b are given transposed.
template <typename T>
__global__ void small_product(Factors<T> factors) {
  constexpr int kStride = 24;
  auto* a = reinterpret_cast<T*>(device::shared_memory());
  T* b = a + 16 * kStride;
  const int lane = threadIdx.x, line = lane % 16, half = lane / 16 * 8;
  device::copy_async_16(a + line * kStride + half, factors.a + line * 16 + half, true);
  device::copy_async_16(b + line * kStride + half, factors.b + line * 16 + half, true);
  device::copy_async_commit();
  device::copy_async_wait<0>();
  device::warp_sync();
  uint32_t left[4], right[4];
  const int other = lane / 8 % 2 * 8 + lane % 8;
  if (factors.mode == 0) {
    device::load_matrices(left, a + other * kStride + half);
    device::load_matrices(right, b + (half + lane % 8) * kStride + lane / 8 % 2 * 8);
  } else {
    device::load_matrices_transposed(left, a + (half + lane % 8) * kStride + lane / 8 % 2 * 8);
    device::load_matrices_transposed(right, b + other * kStride + half);
  }
  for (int j = 0; j < 2; ++j) {
    float acc[4] = {};
    device::mma<T>(acc, left, right[2 * j], right[2 * j + 1]);
    for (int i = 0; i < 4; ++i) {
      factors.out[(lane / 4 + i / 2 * 8) * 16 + 8 * j + lane % 4 * 2 + i % 2] = acc[i];
    }
  }
}

template <typename T>
std::vector<float> product(const std::vector<T>& a, const std::vector<T>& b, int rows, int columns,
                           int depth, bool a_transposed, bool b_transposed) {
  std::vector<float> out(rows * columns);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      for (int k = 0; k < depth; ++k) {
        out[r * columns + c] += float(a[a_transposed ? k * rows + r : r * depth + k]) *
                                float(b[b_transposed ? k * columns + c : c * depth + k]);
      }
    }
  }
  return out;
}

template <typename T>
void check_mma() {
  const auto a = random_matrix<T>(16, 16, 1), b = random_matrix<T>(16, 16, 2);
  for (const int mode : {0, 1}) {
    std::vector<float> out(16 * 16);
    run(small_product<T>, {a.data(), b.data(), out.data(), mode});
    expect_equal(out, product(a, b, 16, 16, 16, mode == 1, mode == 1));
  }
}

// ---- wgmma ------------------------------------------------------------------------------------

enum Mistake { kNone, kNoWait, kEarlyReuse, kNoFence, kOneWarpLess, kNoBarrier };

// out[64, N] = a[64, 64] b[N, 64]ᵀ, a as [k, m] if kTransposed.
template <typename T, bool kTransposed, int kBlocks>
__global__ void __launch_bounds__(128) large_product(Factors<T> factors) {
  constexpr int kColumns = 8 * kBlocks;
  char* a = device::shared_memory();
  char* b = a + 64 * 128;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (int e = thread; e < 64 * 64; e += 128) *swizzled<T>(a, e / 64, e % 64) = factors.a[e];
  for (int e = thread; e < kColumns * 64; e += 128) *swizzled<T>(b, e / 64, e % 64) = factors.b[e];
  device::fence_async_proxy();
  if (factors.mode != kNoBarrier) device::named_barrier(1, 128);
  if (factors.mode == kOneWarpLess && warp == 3) return;
  float acc[kBlocks][4];
  if (factors.mode != kNoFence) device::wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const int step = kTransposed ? 16 * 128 : 32;
    const device::Operand left = device::advance(device::operand(a), step * k);
    const device::Operand right = device::advance(device::operand(b), 32 * k);
    device::wgmma<T, kTransposed, kBlocks>(acc, left, right, k > 0);
    if (k % 2 == 1) device::wgmma_commit();
  }
  if (factors.mode == kEarlyReuse) std::memset(a + 64 * thread, 0, 64);
  if (factors.mode != kNoWait) device::wgmma_wait<0>();
  for (int j = 0; j < kBlocks; ++j) {
    device::wgmma_hold(acc[j]);
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
      factors.out[row * kColumns + column] = acc[j][i];
    }
  }
  if (factors.mode == kNoWait) device::wgmma_wait<0>();
}

template <typename T, bool kTransposed, int kBlocks>
void check_wgmma(int mode = kNone) {
  const auto a = random_matrix<T>(64, 64, 1), b = random_matrix<T>(8 * kBlocks, 64, 2);
  std::vector<float> out(64 * 8 * kBlocks);
  run(large_product<T, kTransposed, kBlocks>, {a.data(), b.data(), out.data(), mode}, 128);
  expect_equal(out, product(a, b, 64, 8 * kBlocks, 64, kTransposed, false));
}

template <typename T>
void check_all_wgmma() {
  check_wgmma<T, false, 2>();
  check_wgmma<T, false, 4>();
  check_wgmma<T, false, 8>();
  check_wgmma<T, true, 2>();
  check_wgmma<T, true, 4>();
  check_wgmma<T, true, 8>();
}

// ---- clusters ---------------------------------------------------------------------------------

struct Exchange {
  float* out;  // [2, 4]
  bool stay;   // until the others have read
};

// Every block sums what all blocks of its cluster hold.
__global__ void exchange(Exchange given) {
  auto* values = reinterpret_cast<float*>(device::shared_memory());
  auto* barrier = reinterpret_cast<Barrier*>(values + 128);
  const int lane = threadIdx.x, rank = device::cluster_rank();
  if (lane == 0) device::barrier_init(barrier, 4);
  device::cluster_sync();
  for (int i = 0; i < 4; ++i) values[4 * lane + i] = 100 * rank + lane;
  device::warp_sync();
  if (lane < 4) device::barrier_arrive_remote(barrier, lane);
  device::barrier_wait(barrier, 0);
  float sum = 0;
  for (int other = 0; other < 4; ++other) sum += device::load_remote(values + 4 * lane, other).w;
  for (int mask = 16; mask > 0; mask /= 2) sum += device::shuffle_xor(sum, mask);
  if (lane == 0) given.out[4 * blockIdx.x + rank] = sum;
  if (given.stay) device::cluster_sync();
}

void check_exchange(bool stay) {
  std::vector<float> out(8);
  run(exchange, {out.data(), stay}, 32, 4);
  expect_equal(out, std::vector<float>(8, 32 * 600 + 4 * 496));
}

// ---- copies -----------------------------------------------------------------------------------

struct Copies {
  const float* from;
  float* out;
  bool wait;
};

__global__ void copy(Copies copies) {
  auto* to = reinterpret_cast<float*>(device::shared_memory()) + 4 * threadIdx.x;
  device::copy_async_16(to, copies.from + 4 * threadIdx.x, threadIdx.x < 16);
  device::copy_async_commit();
  device::copy_async_commit();
  if (copies.wait) device::copy_async_wait<1>();
  for (int i = 0; i < 4; ++i) copies.out[4 * threadIdx.x + i] = to[i];
}

void check_copies(bool wait) {
  alignas(16) float from[128];
  std::vector<float> out(128), expected(128);
  for (int i = 0; i < 128; ++i) from[i] = i;
  for (int i = 0; i < 64; ++i) expected[i] = i;
  run(copy, {from, out.data(), wait});
  expect_equal(out, expected);
}

// ---- refused ----------------------------------------------------------------------------------

struct Nothing {};

template <typename Body>
__global__ void kernel_of(Nothing) {
  Body{}(device::shared_memory(), static_cast<int>(threadIdx.x));
}

// A case of a kernel that is a lambda.
template <typename Body>
std::function<void()> body(Body, int threads = 32) {
  return [threads] { run(kernel_of<Body>, Nothing{}, threads, 1, 1024); };
}

Barrier* barrier_at(char* shared) { return reinterpret_cast<Barrier*>(shared); }

const std::map<std::string, std::function<void()>> cases = {
    {"ring", [] { copy_boxes(kBoxBytes, 1); }},
    {"mma_bf16", check_mma<bf16>},
    {"mma_fp16", check_mma<fp16>},
    {"wgmma_bf16", check_all_wgmma<bf16>},
    {"wgmma_fp16", check_all_wgmma<fp16>},
    {"exchange", [] { check_exchange(true); }},
    {"copies", [] { check_copies(true); }},
    {"exited_threads_leave_the_cluster", body(
                                             [](char*, int thread) {
                                               if (thread < 32) return;
                                               device::cluster_sync();
                                             },
                                             64)},

    {"registers", body(
                      [](char*, int thread) {
                        if (thread < 256) {
                          device::take_registers<232>();
                        } else {
                          device::give_registers<40>();
                        }
                      },
                      384)},

    {"ring_of_too_few_bytes", [] { copy_boxes(kBoxBytes - 128, 1); }},
    {"ring_of_too_many_bytes", [] { copy_boxes(kBoxBytes + 128, 1); }},
    {"ring_of_too_many_arrivals", [] { copy_boxes(kBoxBytes, 2); }},
    {"copies_without_wait", [] { check_copies(false); }},
    {"wgmma_without_wait", [] { check_wgmma<bf16, false, 2>(kNoWait); }},
    {"wgmma_without_fence", [] { check_wgmma<bf16, false, 2>(kNoFence); }},
    {"wgmma_without_barrier", [] { check_wgmma<bf16, false, 2>(kNoBarrier); }},
    {"wgmma_of_three_warps", [] { check_wgmma<bf16, false, 2>(kOneWarpLess); }},
    {"wgmma_reused_early", [] { check_wgmma<bf16, false, 2>(kEarlyReuse); }},
    {"exchange_without_stay", [] { check_exchange(false); }},
    {"missing_barrier", body(
                            [](char*, int thread) {
                              if (thread < 32) device::named_barrier(1, 64);
                            },
                            64)},
    {"counts_differ",
     body([](char*, int thread) { device::named_barrier(1, thread < 32 ? 64 : 96); }, 96)},
    {"divergence", body([](char*, int thread) {
       if (thread < 16) device::warp_sync();
       device::shuffle_xor(0, 1);
     })},
    {"ended_lanes", body([](char*, int thread) {
       if (thread < 16) device::warp_sync();
     })},
    {"outside", body([](char* shared, int thread) {
       device::copy_async_16(shared + 1024 - 16 * thread, shared, false);
     })},
    {"misaligned",
     body([](char* shared, int) { device::copy_async_16(shared + 8, shared, false); })},
    {"written_outside", body([](char* shared, int) { shared[1024] = 1; })},
    {"no_init", body([](char* shared, int) { device::barrier_arrive(barrier_at(shared)); })},
    {"many_arrivals", body([](char* shared, int thread) {
       if (thread > 0) return;
       device::barrier_init(barrier_at(shared), 2);
       device::barrier_arrive_expect(barrier_at(shared), 16);
       device::barrier_arrive(barrier_at(shared));
       device::barrier_arrive(barrier_at(shared));
     })},
    {"never_arrives", body([](char* shared, int thread) {
       if (thread > 0) return;
       device::barrier_init(barrier_at(shared), 1);
       device::barrier_wait(barrier_at(shared), 1);
       device::barrier_wait(barrier_at(shared), 0);
     })},
    {"map_of_odd_rows", [] { device::tensor_map(nullptr, 8, 60, 120, 8, true); }},
    {"many_registers", body(
                           [](char*, int thread) {
                             if (thread < 256) {
                               device::take_registers<240>();
                             } else {
                               device::give_registers<40>();
                             }
                           },
                           384)},
    {"registers_of_one_warp", body(
                                  [](char*, int thread) {
                                    if (thread < 32) device::give_registers<40>();
                                  },
                                  128)},
    {"much_shared_memory", [] { run(copy, {}, 32, 1, 232449); }},
};

}  // namespace
}  // namespace grasp

// Runs a case under a seed; the text of the exception, or nothing.
extern "C" const char* grasp_emulator_selftest(const char* name, uint64_t seed) {
  thread_local std::string message;
  grasp_emulator_configure(seed);
  try {
    grasp::cases.at(name)();
    message.clear();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
