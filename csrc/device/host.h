// What the host side needs of a GPU: properties, tensor maps, launches. Errors become exceptions.
//
// tools/emulator/device has a second version of this header, beside that of primitives.cuh.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace grasp::device {

using TensorMap = CUtensorMap;
using Stream = cudaStream_t;

// The kind of device that kernels run on, as torch names it.
constexpr const char* kDeviceType = "cuda";

struct Properties {
  int device;
  int major;  // of the compute capability
  int multiprocessors;
  int shared_memory;  // bytes that one block may use
};

// Blocks of (x, y); `cluster` of them, next to each other along y, form a cluster.
struct Grid {
  int64_t x, y;
  int cluster;
  int threads;
  int shared_memory;  // dynamic, bytes
  // The kernel calls `wait_for_previous`, so its blocks may be set up while the kernel before it
  // ends.
  bool early = false;
};

Properties properties(int device);

// The current stream of torch on a device.
Stream current_stream(int device);

// Makes a device the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// A matrix [rows, columns] of two-byte elements with contiguous columns, rows `row_bytes` apart,
// cut into boxes of `box_rows` × 64 columns in the 128-byte swizzle.
TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t row_bytes,
                     int box_rows, bool is_bf16);

namespace erased {
int clusters_at_once(const void* kernel, const Grid& grid);
int compiled_for(const void* kernel);
void launch(const void* kernel, const Grid& grid, Stream stream, void* argument);
}  // namespace erased

// Clusters of a kernel that can run at once on the current device.
template <typename Arguments>
int clusters_at_once(void (*kernel)(Arguments), const Grid& grid) {
  return erased::clusters_at_once(reinterpret_cast<const void*>(kernel), grid);
}

// The compute capability, times ten, that the code of a kernel was compiled for which the current
// device runs; 0 if there is none.
template <typename Arguments>
int compiled_for(void (*kernel)(Arguments)) {
  return erased::compiled_for(reinterpret_cast<const void*>(kernel));
}

// Runs a kernel on its one argument; an empty grid is no launch.
template <typename Arguments>
void launch(void (*kernel)(Arguments), const Grid& grid, Stream stream, Arguments argument) {
  erased::launch(reinterpret_cast<const void*>(kernel), grid, stream, &argument);
}

}  // namespace grasp::device
