// The pipeline of all passes: tiles of Z come in, products take them up, results go out.
//
//   gradient pass, Z = dY:  [dS | D] = dY [s B̂ | V]   and   dB = (I − V Vᵀ) s dYᵀ S
//   input pass,    Z = X:                                    dA = dSᵀ X̃
//   down pass,     Z = X:   S = X̃ Aᵀ
//
// A block owns a slab of columns and runs down a range of tokens, its sum over tokens in registers;
// or, in a down pass, it owns 64 tokens and runs along the columns, the skinny result in registers.
// Groups of 128 threads own columns of the tile and depend on each other nowhere in the loop; on
// Hopper warps of their own add the skinny tiles of the groups and write them. Blocks of a down
// pass that share tokens, side by side along y, form clusters there and add their tiles. Shapes: T
// tokens, C columns of Z, R LoRA rank, Q basis size, E rows of the skinny result.

#pragma once

#include <type_traits>

#include "kernels/dropout.cuh"
#include "kernels/exchange.cuh"
#include "kernels/products_sm80.cuh"
#include "kernels/products_sm90.cuh"
#include "kernels/ring_sm80.cuh"
#include "kernels/ring_sm90.cuh"
#include "kernels/skinny.cuh"
#include "kernels/sums.cuh"

namespace grasp {

// Zeros where dropout says, in a group's columns of the tile, 16 bytes a thread at a time.
//
// A thread stays in its column of chunks and goes down 16 rows at a time, which the swizzle repeats
// after eight, so that the next place is one addition away. Two rows at once: a mask is a long
// chain of instructions.
template <int kIndex>
__device__ void drop_tile(const PassArguments& a, const Place& at, char* stage, int64_t token,
                          int64_t column) {
  constexpr Shape S = SHAPES[kIndex];
  constexpr int kStep = kGroup / 8;
  const auto seed = static_cast<uint64_t>(*a.mask.seed);
  const int64_t chunks = a.C / 8;
  const int first = at.thread % kGroup / 8, chunk = at.thread % 8;
  const int rows = a.T - token < kTokens ? static_cast<int>(a.T - token) : kTokens;
  for (int m = 0; m < S.blocks; ++m) {
    const int block = at.group * S.blocks + m;
    const int64_t c = column + kWide * block + 8 * chunk;
    if (c >= a.C) break;
    char* place = stage + block * kTokens * kRowBytes + chunk_offset(first, chunk);
#pragma unroll 2
    for (int row = first; row < rows; row += kStep, place += kStep * kRowBytes) {
      auto& values = *reinterpret_cast<uint4*>(place);
      values = dropped(values, seed, (token + row) * chunks + c / 8, a.mask.threshold);
    }
  }
  device::fence_async_proxy();
  device::named_barrier(2 + at.group, kGroup);
}

// The share of this block in the skinny tiles of a step, when all blocks of the cluster have
// theirs.
template <typename T, int kIndex, typename Exchange>
__device__ void add_skinny(const PassArguments& a, const Exchange& exchange,
                           const Steps<kIndex>& steps, int i) {
  exchange.wait_filled(i);
  reduce_skinny<T, kIndex>(a, exchange, i, steps.token_of(i));
  exchange.arrive_drained(i);
}

template <int kIndex>
using Sm90Exchange = std::conditional_t<SHAPES[kIndex].added_aside(), ExchangeAside<kIndex>,
                                        ExchangeInCluster<kIndex>>;

template <typename T, int kIndex>
struct Pass {
  static constexpr Shape S = SHAPES[kIndex];
  static constexpr int kSkinnyBlocks = S.skinny() ? S.E / 8 : 2;  // 2: an array that nothing uses
  static constexpr int kSumBlocks = S.sums() ? S.R / 8 : 2;
  using Ring = std::conditional_t<S.arch == 90, RingSm90<kIndex>, RingSm80<kIndex>>;
  using Exchange = std::conditional_t<S.arch == 90, Sm90Exchange<kIndex>, ExchangeSm80<kIndex>>;
  using Products = std::conditional_t<S.arch == 90, ProductsSm90<T>, ProductsSm80<T>>;

  const PassArguments& a;
  const Steps<kIndex>& steps;
  Ring& ring;
  Exchange& exchange;
  Place at;
  Products products{at};
  Shared<kIndex> shared;

  float skinny[kSkinnyBlocks][4];
  float sums[S.blocks][kSumBlocks][4];

  __device__ Pass(const PassArguments& arguments, const Steps<kIndex>& where, Ring& tiles,
                  Exchange& others)
      : a(arguments), steps(where), ring(tiles), exchange(others) {}

  __device__ void run() {
    clear_skinny();
#pragma unroll
    for (int m = 0; m < S.blocks; ++m) {
#pragma unroll
      for (int j = 0; j < kSumBlocks; ++j) {
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[m][j][n] = 0.0f;
      }
    }
    if constexpr (S.sums() && S.skinny()) {
      load_factor<T, kIndex>(a, shared, at, steps.column);
    }
#pragma unroll 1
    for (int i = 0; i < steps.count; ++i) step(i);
    finish();
  }

 private:
  __device__ void step(int i) {
    char* stage = ring.acquire(i);
    if (a.mask.seed != nullptr) {
      drop_tile<kIndex>(a, at, stage, steps.token_of(i), steps.column_of(i));
    }
    hold();
    products.begin();
    if constexpr (S.skinny()) skinny_product(stage);
    products.commit();
    if constexpr (S.sums()) {
      sums_product(stage);
      products.commit();
    }
    if constexpr (S.sums() && S.skinny()) {
      if (i > 0 && !S.added_aside()) reduce(i - 1);  // while the products are under way
      products.template wait<1>();
      hand_over(i);
      clear_skinny();
    }
    products.template wait<0>();
    hold();
    ring.release(i);
  }

  __device__ void finish() {
    if constexpr (S.sums()) {
      if constexpr (S.skinny() && !S.added_aside()) {
        if (steps.count > 0) reduce(steps.count - 1);
      }
      write_sums<kIndex>(a, at, steps.column, sums);
      if (a.shares != nullptr) write_shares<kIndex>(a, shared, at, steps.column, sums);
    } else {
      hand_over(0);
      reduce(0);
    }
  }

  __device__ void skinny_product(char* stage) {
    const char* factor = S.sums() ? shared.factor() : shared.beside(stage);
#pragma unroll
    for (int m = 0; m < S.blocks; ++m) {
      const int block = at.group * S.blocks + m;
      products.skinny(skinny, stage + block * kTokens * kRowBytes,
                      factor + block * S.E * kRowBytes);
    }
  }

  __device__ void sums_product(char* stage) {
#pragma unroll
    for (int m = 0; m < S.blocks; ++m) {
      const int block = at.group * S.blocks + m;
      products.sums(sums[m], stage + block * kTokens * kRowBytes, shared.beside(stage));
    }
  }

  // Tile i to its readers.
  __device__ void hand_over(int i) {
    products.hold(skinny);
    exchange.wait_drained(i);
    store_skinny<kIndex>(shared, at, i, skinny);
    exchange.arrive_filled(i);
  }

  __device__ void reduce(int i) { add_skinny<T, kIndex>(a, exchange, steps, i); }

  __device__ void hold() {
    if constexpr (S.skinny()) products.hold(skinny);
    if constexpr (S.sums()) {
#pragma unroll
      for (int m = 0; m < S.blocks; ++m) products.hold(sums[m]);
    }
  }

  __device__ void clear_skinny() {
#pragma unroll
    for (int j = 0; j < kSkinnyBlocks; ++j) {
#pragma unroll
      for (int n = 0; n < 4; ++n) skinny[j][n] = 0.0f;
    }
  }
};

template <typename T, int kIndex>
__device__ void run_sm80(const PassArguments& a) {
  const Steps<kIndex> steps(a);
  RingSm80<kIndex> ring(a, steps);
  ExchangeSm80<kIndex> exchange;
  Pass<T, kIndex>(a, steps, ring, exchange).run();
}

template <typename T, int kIndex>
__device__ void run_sm90(const PassArguments& a) {
  constexpr Shape S = SHAPES[kIndex];
  const Steps<kIndex> steps(a);
  RingSm90<kIndex> ring(a, steps);
  Sm90Exchange<kIndex> exchange(a.cluster);
  if (threadIdx.x == 0) {
    ring.init();
    exchange.init();
    device::barrier_init_fence();
  }
  device::warp_sync();
  device::cluster_sync();  // no block touches barriers of another before they are there
  if (threadIdx.x >= S.consumers()) {
    device::give_registers<72>();
    if (threadIdx.x == S.consumers()) {
      ring.fill();
      device::release_next();
    } else if (S.added_aside() && threadIdx.x >= S.first_adder()) {
      if constexpr (S.added_aside()) {
        for (int i = 0; i < steps.count; ++i) add_skinny<T, kIndex>(a, exchange, steps, i);
      }
    }
    device::warp_sync();
  } else {
    device::take_registers<216>();
    Pass<T, kIndex>(a, steps, ring, exchange).run();
  }
  device::cluster_sync();  // nor leaves while another reads from it
}

template <typename T, int kIndex>
__global__ void __launch_bounds__(SHAPES[kIndex].threads(), 1)
    pass_kernel(const __grid_constant__ PassArguments a) {
  if constexpr (device::made_here(SHAPES[kIndex].arch)) {
    if constexpr (SHAPES[kIndex].arch == 90) {
      run_sm90<T, kIndex>(a);
    } else {
      run_sm80<T, kIndex>(a);
    }
  } else {
    device::stop();  // plan.h chooses no kernel that was not made for the device
  }
}

}  // namespace grasp
