#include "device/primitives.cuh"

#include <cstring>
#include <utility>

#include "machine.h"

namespace grasp::device {

using emulator::Block;
using emulator::current;
using emulator::fail;
using emulator::kWarp;
using emulator::machine;
using emulator::Operation;
using emulator::Phases;
using emulator::Thread;
using emulator::Warp;

namespace {

Block& block() { return *current().warp->block; }

uint32_t barrier_offset(const Barrier* barrier) {
  return block().offset(barrier, sizeof(Barrier), sizeof(Barrier));
}

Phases& phases(const Barrier* barrier) { return block().barrier(barrier_offset(barrier)); }

float as_float(uint16_t bits, bool is_bf16) {
  return is_bf16 ? float(bf16(bits, bf16::from_bits())) : float(fp16(bits, fp16::from_bits()));
}

bool nothing(Warp&) { return true; }

}  // namespace

uint32_t shared_address(const void* shared) { return kSharedWindow + block().offset(shared, 0, 1); }

char* shared_memory() { return block().shared; }

// ---- warps and blocks -------------------------------------------------------------------------

void stop() { emulator::fail("the kernel stopped itself"); }

void warp_sync() { machine().meet({"warp_sync"}, nullptr, nothing); }

float shuffle_xor(float value, int mask) {
  if (mask < 0 || mask >= kWarp) fail("shuffle_xor with mask " + std::to_string(mask));
  struct Argument {
    float value, received;
  } argument = {value, 0};
  machine().meet({"shuffle_xor", 1, {mask}}, &argument, [mask](Warp& warp) {
    for (int lane = 0; lane < kWarp; ++lane) {
      static_cast<Argument*>(warp.arguments[lane])->received =
          static_cast<Argument*>(warp.arguments[lane ^ mask])->value;
    }
    return true;
  });
  return argument.received;
}

void named_barrier(int id, int threads) {
  if (id < 1 || id > 15) fail("there is no named barrier " + std::to_string(id));
  if (threads <= 0 || threads % kWarp != 0) {
    fail("a named barrier of " + std::to_string(threads) + " threads, not a multiple of 32");
  }
  machine().meet({"named_barrier", 2, {id, threads}}, nullptr, [id, threads](Warp& warp) {
    emulator::NamedBarrier& barrier = warp.block->named[id];
    if (barrier.waiting.empty()) barrier.threads = threads;
    if (barrier.threads != threads) {
      fail("named barrier " + std::to_string(id) + " is used for " + std::to_string(threads) +
           " and for " + std::to_string(barrier.threads) + " threads");
    }
    barrier.waiting.push_back(&warp);
    if (static_cast<int>(barrier.waiting.size()) * kWarp == threads) {
      for (Warp* waiting : std::exchange(barrier.waiting, {})) machine().release(*waiting);
    }
    return false;
  });
}

void erased::give_registers(int count) {
  machine().meet({"give_registers", 1, {count}}, nullptr, [count](Warp& warp) {
    warp.block->give_registers(warp, count);
    return true;
  });
}

void erased::take_registers(int count) {
  machine().meet({"take_registers", 1, {count}}, nullptr, [count](Warp& warp) {
    warp.block->take_registers(warp, count);
    return false;
  });
}

// ---- copies of Ampere -------------------------------------------------------------------------

void copy_async_16(void* shared, const void* global, bool valid) {
  block().offset(shared, 16, 16);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("misaligned address: copy_async_16 from global memory");
  }
  auto* to = static_cast<char*>(shared);
  const auto* from = static_cast<const char*>(global);
  if (machine().adversary().late()) {
    std::memset(to, emulator::kPoison, 16);
    current().copies.push_back({to, from, valid});
  } else if (valid) {
    std::memcpy(to, from, 16);
  } else {
    std::memset(to, 0, 16);
  }
}

void copy_async_commit() {
  current().groups.push_back(std::move(current().copies));
  current().copies.clear();
}

void erased::copy_async_wait(int pending) { emulator::finish_copies(current(), pending); }

// ---- products of Ampere -----------------------------------------------------------------------

namespace {

struct Matrices {
  const char* row;  // that this lane gives
  uint32_t* out;
};

void load_matrices(uint32_t (&out)[4], const void* shared, bool transposed) {
  block().offset(shared, 16, 16);
  Matrices argument = {static_cast<const char*>(shared), out};
  machine().meet({transposed ? "load_matrices_transposed" : "load_matrices"}, &argument,
                 [transposed](Warp& warp) {
                   const auto lane_of = [&warp](int lane) {
                     return *static_cast<Matrices*>(warp.arguments[lane]);
                   };
                   const auto element = [&](int matrix, int row, int column) {
                     uint16_t bits;
                     std::memcpy(&bits, lane_of(8 * matrix + row).row + 2 * column, 2);
                     return uint32_t(bits);
                   };
                   for (int lane = 0; lane < kWarp; ++lane) {
                     const int major = lane / 4, minor = lane % 4 * 2;
                     for (int i = 0; i < 4; ++i) {
                       const uint32_t low =
                           transposed ? element(i, minor, major) : element(i, major, minor);
                       const uint32_t high =
                           transposed ? element(i, minor + 1, major) : element(i, major, minor + 1);
                       lane_of(lane).out[i] = low | high << 16;
                     }
                   }
                   return true;
                 });
}

struct Fragments {
  float* acc;
  const uint32_t* a;
  uint32_t b[2];
};

void multiply(const std::array<void*, kWarp>& arguments, bool is_bf16) {
  float a[16][16], b[16][8], product[16][8] = {};
  const auto low = [is_bf16](uint32_t pair) { return as_float(pair & 0xffff, is_bf16); };
  const auto high = [is_bf16](uint32_t pair) { return as_float(pair >> 16, is_bf16); };
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& given = *static_cast<Fragments*>(arguments[lane]);
    const int major = lane / 4, minor = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* to = &a[major + i % 2 * 8][minor + i / 2 * 8];
      to[0] = low(given.a[i]);
      to[1] = high(given.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[minor + 8 * i][major] = low(given.b[i]);
      b[minor + 8 * i + 1][major] = high(given.b[i]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* acc = static_cast<Fragments*>(arguments[lane])->acc;
    for (int i = 0; i < 4; ++i) acc[i] += product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void load_matrices(uint32_t (&out)[4], const void* shared) { load_matrices(out, shared, false); }

void load_matrices_transposed(uint32_t (&out)[4], const void* shared) {
  load_matrices(out, shared, true);
}

void erased::mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16) {
  Fragments argument = {acc, a, {b0, b1}};
  machine().meet({"mma", 1, {is_bf16}}, &argument, [is_bf16](Warp& warp) {
    multiply(warp.arguments, is_bf16);
    return true;
  });
}

// ---- barriers in shared memory, Hopper --------------------------------------------------------

void barrier_init(Barrier* barrier, int arrivals) {
  if (arrivals < 1 || arrivals >= 1 << 20) {
    fail("an mbarrier of " + std::to_string(arrivals) + " arrivals");
  }
  block().init_barrier(barrier_offset(barrier), arrivals);
}

void barrier_arrive(Barrier* barrier) { emulator::arrive(phases(barrier)); }

void barrier_arrive_expect(Barrier* barrier, int bytes) {
  if (bytes < 0 || bytes >= 1 << 20) {
    fail("an mbarrier cannot expect " + std::to_string(bytes) + " bytes at once");
  }
  Phases& announced = phases(barrier);
  announced.bytes += bytes;
  emulator::arrive(announced);
}

void barrier_arrive_remote(Barrier* barrier, int rank) {
  emulator::arrive(machine().block(rank).barrier(barrier_offset(barrier)));
}

// A thread that is woken late finds the next phase over, too, and waits for the one after, as a GPU
// may.
void barrier_wait(Barrier* barrier, int parity) {
  const uint32_t offset = barrier_offset(barrier);
  if (parity != 0 && parity != 1) fail("barrier_wait for parity " + std::to_string(parity));
  Phases& awaited = block().barrier(offset);
  while (awaited.parity == parity) {
    awaited.waiting.push_back(&current());
    machine().wait({"barrier_wait", 2, {offset, parity}});
  }
}

// ---- clusters ---------------------------------------------------------------------------------

void cluster_sync() {
  machine().meet({"cluster_sync"}, nullptr, [](Warp& warp) {
    machine().cluster_arrive(warp);
    return false;
  });
}

int cluster_rank() { return block().rank; }

float4 load_remote(const float* shared, int rank) {
  const uint32_t offset = block().offset(shared, sizeof(float4), sizeof(float4));
  float4 value;
  std::memcpy(&value, machine().block(rank).shared + offset, sizeof value);
  return value;
}

// ---- the copy engine, Hopper ------------------------------------------------------------------

void copy_box(void* shared, const TensorMap* map, Barrier* barrier, int column, int row) {
  if (column < 0 || row < 0) fail("copy_box at a negative coordinate");
  const uint32_t to = block().offset(shared, 128 * map->box_rows, 128);
  const uint32_t at = barrier_offset(barrier);
  block().barrier(at);
  machine().issue({*map, &block(), to, at, column, row});
}

// ---- products of Hopper -----------------------------------------------------------------------

Operand operand(const void* shared) {
  block().offset(shared, 16, 16);
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kEightRows = uint64_t(1024 >> 4) << 32;
  constexpr uint64_t kLeading = uint64_t(1) << 16;
  return {kSwizzle128 | kEightRows | kLeading | ((shared_address(shared) & 0x3ffff) >> 4)};
}

void wgmma_fence() {
  machine().meet({"wgmma_fence"}, nullptr, [](Warp& warp) {
    warp.products.fence();
    return true;
  });
}

void wgmma_commit() {
  machine().meet({"wgmma_commit"}, nullptr, [](Warp& warp) {
    warp.products.commit();
    return true;
  });
}

void erased::wgmma_wait(int pending) {
  machine().meet({"wgmma_wait", 1, {pending}}, nullptr, [pending](Warp& warp) {
    warp.products.wait(warp, pending);
    return true;
  });
}

void erased::wgmma(float (*acc)[4], const Product& product) {
  const int64_t kind =
      product.blocks << 3 | product.is_bf16 << 2 | product.transposed << 1 | int(product.add);
  const Operation operation = {
      "wgmma", 3, {static_cast<int64_t>(product.a), static_cast<int64_t>(product.b), kind}};
  machine().meet(operation, acc, [&product](Warp& warp) {
    std::array<emulator::Products::Accumulators, kWarp> accumulators;
    for (int lane = 0; lane < kWarp; ++lane) {
      accumulators[lane] = static_cast<float (*)[4]>(warp.arguments[lane]);
    }
    warp.products.issue(warp, product, accumulators);
    return true;
  });
}

}  // namespace grasp::device
