// The sizes of the finish, which host and kernel share.

#pragma once

#include <cstdint>

namespace grasp {

constexpr int kFinishThreads = 256;
constexpr int kFinishColumns = 32;  // of the sums, a block

constexpr int64_t finish_blocks(int64_t size, int each) { return (size + each - 1) / each; }

// Bytes of shared memory: sums of shares by up to a block of threads, then the shares.
constexpr int finish_shared_memory(int Q, int R) {
  return static_cast<int>(sizeof(float)) * (Q * R > kFinishThreads ? Q * R : kFinishThreads);
}

}  // namespace grasp
