// The sizes that kernels are compiled for. Plain constexpr C++, read by kernels, host and `_host`.
//
// Shapes: T tokens, C columns of the large operand Z (N of dY, K of X), R LoRA rank, Q basis size,
// E = R + Q rows of a skinny result. A block works on tiles of 64 tokens × `columns()`.

#pragma once

#include <cstddef>

namespace grasp {

// What comes out of one read of Z[T, C].
enum class Kind {
  gradient,  // Zᵀ Lᵀ [C, R] over a range of tokens, and F Zᵀ [E, T] of a slab of columns
  input,     // Zᵀ Lᵀ [C, R] alone
  down,      // F Zᵀ [E, T] over a range of columns
};

constexpr int kTokens = 64;        // of a tile: the rows of one warpgroup product
constexpr int kWide = 64;          // columns of a block of a tile: 128 bytes, one swizzled row
constexpr int kRowBytes = 128;     // of every operand in shared memory
constexpr int kGroup = 128;        // threads that work on the same columns: one warpgroup
constexpr int kSkinnyStride = 68;  // floats between rows of a skinny tile: no bank conflicts
constexpr int kMaxSkinny = 160;    // largest R + Q

struct Shape {
  Kind kind;
  int arch;     // 80: cp.async and mma.sync; 90: TMA, wgmma and clusters
  int R;        // largest rank, a multiple of 16; 0 if there is no sum over tokens
  int E;        // most skinny rows, a multiple of 16; 0 if there are none
  int groups;   // groups of threads, each with columns of its own
  int blocks;   // of 64 columns in a group
  int stages;   // tiles in flight
  int buffers;  // skinny tiles between their writers and their readers; 0 if there are none

  constexpr bool sums() const { return R > 0; }
  constexpr bool skinny() const { return E > 0; }
  constexpr bool along_tokens() const { return sums(); }
  // Whether warps that compute nothing add the skinny tiles of a step while the next ones come in.
  constexpr bool added_aside() const { return arch == 90 && sums() && skinny(); }
  constexpr int columns() const { return kWide * blocks * groups; }
  constexpr int consumers() const { return kGroup * groups; }
  // On Hopper one more group, of which one thread asks for copies, three warps add skinny tiles and
  // all give registers to those that compute.
  constexpr int threads() const { return consumers() + (arch == 90 ? kGroup : 0); }
  constexpr int first_adder() const { return added_aside() ? consumers() + 32 : 0; }
  constexpr int adders() const { return added_aside() ? kGroup - 32 : consumers(); }

  // Bytes of shared memory, in this order: stages of [Z | L or F], resident F, skinny tiles,
  // barriers. Operands begin at boundaries of 1024 bytes, as the swizzle asks.
  constexpr int z_bytes() const { return columns() * kRowBytes; }
  constexpr int factor_bytes() const { return E * columns() * 2; }
  constexpr int stage_bytes() const {
    return z_bytes() + (sums() ? R * kRowBytes : factor_bytes());
  }
  constexpr int factor_offset() const { return stages * stage_bytes(); }
  constexpr int skinny_offset() const {
    return factor_offset() + (sums() && skinny() ? factor_bytes() : 0);
  }
  constexpr int skinny_floats() const { return groups * E * kSkinnyStride; }
  constexpr int barrier_offset() const {
    return skinny_offset() + buffers * skinny_floats() * static_cast<int>(sizeof(float));
  }
  constexpr int n_barriers() const {
    return arch == 90 ? 2 * stages + (added_aside() ? 2 * buffers : buffers) : 0;
  }
  constexpr int shared_memory() const { return barrier_offset() + 8 * n_barriers(); }
};

// Smallest first: the first that fits is taken. Not measured yet; chosen so that nothing spills, at
// least 24 KB are in flight in a multiprocessor, and blocks fit into 227 KB on Hopper and into the
// 99 KB of the small parts that run the code for sm_80, small ranks twice into the 163 KB of an
// A100, whose blocks wait for all of their threads. Before Hopper a skinny result of more than 32
// rows costs less in a second read of Z than in partial sums, one a slab of 128 columns
// (csrc/README.md), so the larger gradient passes are missing.
// clang-format off
constexpr Shape SHAPES[] = {
    // kind, arch, R, E, groups, blocks, stages, buffers
    {Kind::gradient, 90, 16, 16, 2, 4, 2, 2},
    {Kind::gradient, 90, 16, 32, 2, 4, 2, 2},
    {Kind::gradient, 90, 32, 64, 2, 2, 3, 2},
    {Kind::gradient, 80, 16, 16, 2, 1, 3, 1},
    {Kind::gradient, 80, 16, 32, 2, 1, 3, 1},
    {Kind::gradient, 80, 32, 32, 2, 1, 3, 1},
    {Kind::input, 90, 16, 0, 2, 2, 4, 0},
    {Kind::input, 90, 32, 0, 2, 2, 4, 0},
    {Kind::input, 90, 64, 0, 2, 1, 6, 0},
    {Kind::input, 90, 128, 0, 2, 1, 4, 0},
    {Kind::input, 90, 160, 0, 2, 1, 4, 0},
    {Kind::input, 80, 16, 0, 2, 1, 4, 0},
    {Kind::input, 80, 32, 0, 2, 1, 4, 0},
    {Kind::input, 80, 64, 0, 2, 1, 4, 0},
    {Kind::input, 80, 128, 0, 2, 1, 3, 0},
    {Kind::input, 80, 160, 0, 2, 1, 2, 0},
    {Kind::down, 90, 0, 16, 2, 2, 4, 1},
    {Kind::down, 90, 0, 32, 2, 2, 4, 1},
    {Kind::down, 90, 0, 64, 2, 1, 4, 1},
    {Kind::down, 90, 0, 128, 2, 1, 3, 1},
    {Kind::down, 90, 0, 160, 2, 1, 2, 1},
    {Kind::down, 80, 0, 16, 2, 1, 3, 1},
    {Kind::down, 80, 0, 32, 2, 1, 3, 1},
    {Kind::down, 80, 0, 64, 2, 1, 2, 1},
    {Kind::down, 80, 0, 128, 1, 1, 2, 1},
    {Kind::down, 80, 0, 160, 1, 1, 2, 1},
};
// clang-format on
constexpr int kShapes = static_cast<int>(sizeof(SHAPES) / sizeof(Shape));

constexpr bool all_fit() {
  for (const Shape& shape : SHAPES) {
    // Two groups share what the copying group gives back of its registers.
    if (shape.arch == 90 && shape.groups != 2) return false;
    if (shape.shared_memory() > (shape.arch == 90 ? 227 : 99) * 1024) return false;
  }
  return true;
}
static_assert(all_fit(), "a shape takes more registers or shared memory than its parts have");

}  // namespace grasp
