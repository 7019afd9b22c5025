// The instructions that the passes are made of, one function each, and nothing else.
//
// Kernels call these and plain C++, so that a second version of this header can stand in for a GPU:
// tools/emulator/device has it. Pointers are generic; those called `shared` point into the shared
// memory of the block. Names and semantics are those of the PTX ISA.

#pragma once

#include <cuda.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

// wgmma and setmaxnreg exist in code for sm_90a alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GRASP_SM90A 1
#else
#define GRASP_SM90A 0
#endif

namespace grasp::device {

using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;
using TensorMap = CUtensorMap;
using Barrier = uint64_t;  // an mbarrier in shared memory

// Whether this compilation makes code of the kernels for an architecture, 80 or 90.
constexpr bool made_here(int arch) { return arch == (GRASP_SM90A ? 90 : 80); }

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The dynamic shared memory of the block, from a boundary of 1024 bytes on.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char grasp_shared_memory[];
  return grasp_shared_memory;
}

// ---- warps and blocks -------------------------------------------------------------------------

__device__ __forceinline__ void warp_sync() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Waits for `threads` threads of the block at barrier `id`, 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers a thread of a warpgroup gives back, or takes from those that were given back.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#if GRASP_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if GRASP_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Both halves of a product in one instruction; of a plain 64-bit product the compiler makes three.
__device__ __forceinline__ uint64_t multiply_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

// The kernel that this thread's block belongs to lets the next one be set up, once all blocks did.
__device__ __forceinline__ void release_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before this one is over and what it wrote is visible.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Ends the program with an error.
__device__ __forceinline__ void stop() { __trap(); }

// ---- copies of Ampere -------------------------------------------------------------------------

// Sixteen bytes from global to shared memory; zeros if not `valid`, and `global` is not read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- products of Ampere -----------------------------------------------------------------------

// Four 8×8 matrices of two-byte elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared))
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared))
               : "memory");
}

// acc[16, 8] += a[16, 16] b[16, 8], mma.m16n8k16 with row-major a and column-major b.
template <typename T>
__device__ __forceinline__ void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#define GRASP_MMA(TYPE)                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, bf16>) {
    GRASP_MMA("bf16");
  } else {
    GRASP_MMA("f16");
  }
#undef GRASP_MMA
}

// ---- barriers in shared memory, Hopper --------------------------------------------------------

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives and announces `bytes` that copies will bring.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Arrives at the same barrier of block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_remote(Barrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits until the phase of parity `parity` is complete; what arrivals released is then visible.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- clusters ---------------------------------------------------------------------------------

// Waits for all threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Four floats at `shared` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float4 load_remote(const float* shared, int rank) {
  float4 value;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n"
      "}"
      : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return value;
}

// ---- the copy engine, Hopper ------------------------------------------------------------------

__device__ __forceinline__ void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box of `map` at (column, row), rows of 128 bytes in the 128-byte swizzle; what lies outside
// of the matrix comes as zeros. The barrier learns of the bytes when they have come.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap* map, Barrier* barrier,
                                         int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// What this thread wrote to shared memory becomes visible to the copy engine and to wgmma.
__device__ __forceinline__ void fence_async_proxy() {
#if GRASP_SM90A
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- products of Hopper -----------------------------------------------------------------------

// An operand in shared memory, rows of 128 bytes in the 128-byte swizzle, eight rows 1024 bytes
// apart from the next eight. `shared` stands at a boundary of 1024 bytes, or by a multiple of 32
// behind one to begin at a later column.
struct Operand {
  uint64_t bits;
};

__device__ __forceinline__ Operand operand(const void* shared) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kEightRows = uint64_t(1024 >> 4) << 32;
  constexpr uint64_t kLeading = uint64_t(1) << 16;  // unused: one atom is as wide as an operand
  return {kSwizzle128 | kEightRows | kLeading | ((shared_address(shared) & 0x3ffff) >> 4)};
}

__device__ __forceinline__ Operand advance(Operand from, int bytes) {
  return {from.bits + (bytes >> 4)};
}

__device__ __forceinline__ void wgmma_fence() {
#if GRASP_SM90A
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#if GRASP_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `kPending` of the committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#if GRASP_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving an accumulator while products write to it.
__device__ __forceinline__ void wgmma_hold(float (&acc)[4]) {
  asm volatile("" : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])::"memory");
}

// acc[64, N] = a[64, 16] b[16, N] (+ acc if `add`) by the four warps of a group, N = 8 kBlocks of
// 16, 32 or 64. acc[j][..] is what mma.m16n8k16 would hold of columns 8j.. in the 16 rows of a
// warp. b is K-major, N rows of K. a is K-major, 64 rows of K, or with kTransposed M-major, 16 rows
// of M.
template <typename T, bool kTransposed, int kBlocks>
__device__ __forceinline__ void wgmma(float (*acc)[4], Operand a, Operand b, bool add) {
  static_assert(kBlocks == 2 || kBlocks == 4 || kBlocks == 8);
#if GRASP_SM90A
#define GRASP_ACC(j) "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
#define GRASP_WGMMA(TYPE, SHAPE, REGISTERS, A, B, ADD, TRANSPOSED, ...)                         \
  asm volatile(                                                                                 \
      "{\n"                                                                                     \
      ".reg .pred add;\n"                                                                       \
      "setp.ne.b32 add, " ADD                                                                   \
      ", 0;\n"                                                                                  \
      "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B \
      ", add, 1, 1, " TRANSPOSED                                                                \
      ", 0;\n"                                                                                  \
      "}"                                                                                       \
      : __VA_ARGS__                                                                             \
      : "l"(a.bits), "l"(b.bits), "r"(int(add)), "n"(int(kTransposed)))
#define GRASP_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define GRASP_16 GRASP_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define GRASP_32 \
  GRASP_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GRASP_ACC2(j) GRASP_ACC(j), GRASP_ACC(j + 1)
#define GRASP_ACC4(j) GRASP_ACC2(j), GRASP_ACC2(j + 2)
#define GRASP_WGMMA_ANY(TYPE)                                                            \
  if constexpr (kBlocks == 2) {                                                          \
    GRASP_WGMMA(TYPE, "m64n16k16", GRASP_8, "%8", "%9", "%10", "%11", GRASP_ACC2(0));    \
  } else if constexpr (kBlocks == 4) {                                                   \
    GRASP_WGMMA(TYPE, "m64n32k16", GRASP_16, "%16", "%17", "%18", "%19", GRASP_ACC4(0)); \
  } else {                                                                               \
    GRASP_WGMMA(TYPE, "m64n64k16", GRASP_32, "%32", "%33", "%34", "%35", GRASP_ACC4(0),  \
                GRASP_ACC4(4));                                                          \
  }
  if constexpr (std::is_same_v<T, bf16>) {
    GRASP_WGMMA_ANY("bf16")
  } else {
    GRASP_WGMMA_ANY("f16")
  }
#undef GRASP_WGMMA_ANY
#undef GRASP_ACC4
#undef GRASP_ACC2
#undef GRASP_32
#undef GRASP_16
#undef GRASP_8
#undef GRASP_WGMMA
#undef GRASP_ACC
#endif
}

}  // namespace grasp::device
