#include "device/host.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "machine.h"

namespace grasp::device {
namespace {

std::mutex launching;  // autograd launches from threads of its own
emulator::Adversary adversary(0);
Properties part = {0, 9, 8, 232448};

void check(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("emulator: ") + what + ".");
}

void check_grid(const Grid& grid) {
  check(grid.x >= 0 && grid.x < int64_t(1) << 31 && grid.y >= 0 && grid.y <= 65535,
        "a grid has at most 2147483647 × 65535 blocks");
  check(grid.threads > 0 && grid.threads <= 1024 && grid.threads % emulator::kWarp == 0,
        "a block has a multiple of 32 threads, at most 1024");
  check(grid.cluster >= 1 && grid.cluster <= 8 && grid.y % grid.cluster == 0,
        "a cluster has 1 to 8 blocks, and the grid a multiple of them");
  check(grid.cluster == 1 || part.major >= 9, "clusters need compute capability 9.0");
  check(grid.shared_memory >= 0 && grid.shared_memory <= part.shared_memory,
        "a block asks for more shared memory than there is");
}

}  // namespace

Properties properties(int) {
  const std::lock_guard lock(launching);
  return part;
}

Stream current_stream(int) { return nullptr; }

TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t row_bytes,
                     int box_rows, bool) {
  check(reinterpret_cast<uintptr_t>(matrix) % 16 == 0,
        "misaligned address: a tensor map begins at a multiple of 16 bytes");
  check(row_bytes > 0 && row_bytes % 16 == 0 && row_bytes < int64_t(1) << 40,
        "misaligned address: rows of a tensor map are a multiple of 16 bytes apart");
  check(rows > 0 && rows <= int64_t(1) << 32 && columns > 0 && columns <= int64_t(1) << 32,
        "a tensor map has 1 to 2^32 rows and columns");
  check(box_rows >= 1 && box_rows <= 256, "a box has 1 to 256 rows");
  return {static_cast<const char*>(matrix), rows, columns, row_bytes, box_rows};
}

namespace erased {

int clusters_at_once(const Grid& grid) {
  return std::max(1, properties(0).multiprocessors / grid.cluster);
}

void launch(const Grid& grid, const std::function<void()>& thread) {
  const std::lock_guard lock(launching);
  check_grid(grid);
  if (grid.x == 0 || grid.y == 0) return;
  gridDim = {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 1};
  blockDim = {static_cast<unsigned>(grid.threads), 1, 1};
  std::vector<int64_t> clusters(grid.x * grid.y / grid.cluster);
  std::iota(clusters.begin(), clusters.end(), 0);
  if (!adversary.orderly()) {
    for (std::size_t i = clusters.size(); i > 1; --i) {
      std::swap(clusters[i - 1], clusters[adversary.below(i)]);
    }
  }
  emulator::Machine machine(grid, thread, adversary);
  for (const int64_t cluster : clusters) {
    machine.run_cluster(static_cast<unsigned>(cluster % grid.x),
                        static_cast<unsigned>(cluster / grid.x * grid.cluster));
  }
}

}  // namespace erased
}  // namespace grasp::device

void grasp_emulator_configure(uint64_t seed) {
  const std::lock_guard lock(grasp::device::launching);
  grasp::device::adversary = grasp::emulator::Adversary(seed);
}

void grasp_emulator_part(int major, int multiprocessors, int shared_memory) {
  const std::lock_guard lock(grasp::device::launching);
  grasp::device::part = {0, major, multiprocessors, shared_memory};
}
