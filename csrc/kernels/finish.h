// The sizes of the finish, which host and kernel share.

#pragma once

#include <cstdint>

namespace grasp {

constexpr int kFinishThreads = 256;
// Of the sums, a block.
constexpr int kFinishColumns = 32, kFinishRanks = kFinishThreads / kFinishColumns;

constexpr int64_t finish_blocks(int64_t size, int each) { return (size + each - 1) / each; }

}  // namespace grasp
