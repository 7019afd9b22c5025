// The second version of csrc/device/host.h: the device is the emulator, its memory is the host's.

#pragma once

#include <cstdint>
#include <functional>

#include "tensor_map.h"

namespace grasp::device {

using Stream = void*;

constexpr const char* kDeviceType = "cpu";

struct Properties {
  int device;
  int major;
  int multiprocessors;
  int shared_memory;
};

struct Grid {
  int64_t x, y;
  int cluster;
  int threads;
  int shared_memory;
  bool early = false;
};

Properties properties(int device);

Stream current_stream(int device);

class OnDevice {
 public:
  explicit OnDevice(int) {}
};

TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t row_bytes,
                     int box_rows, bool is_bf16);

namespace erased {
int clusters_at_once(const Grid& grid);
void launch(const Grid& grid, const std::function<void()>& thread);
}  // namespace erased

template <typename Arguments>
int clusters_at_once(void (*)(Arguments), const Grid& grid) {
  return erased::clusters_at_once(grid);
}

// Every kernel is there for every part.
template <typename Arguments>
int compiled_for(void (*)(Arguments)) {
  return 10 * properties(0).major;
}

template <typename Arguments>
void launch(void (*kernel)(Arguments), const Grid& grid, Stream, Arguments argument) {
  erased::launch(grid, [&] { kernel(argument); });
}

}  // namespace grasp::device

extern "C" {

// How the following launches order what CUDA leaves open. Seed 0: warps take turns and asynchronous
// work is done where it is issued. Other seeds choose warps and lanes at random; asynchronous work
// is then done as late as it may be (odd seeds), or early or late at random (even seeds).
void grasp_emulator_configure(uint64_t seed);

// The GPU that `properties` describes.
void grasp_emulator_part(int major, int multiprocessors, int shared_memory);
}
