#include "device/host.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <array>
#include <mutex>

#include "refuse.h"

// Weak, so that the library loads beside a torch without CUDA, where nothing is launched.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace grasp::device {
namespace {

void check(cudaError_t error, const char* what) {
  GRASP_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error), ".");
}

using Attributes = std::array<cudaLaunchAttribute, 2>;

// `attributes` has to live as long as what is returned.
cudaLaunchConfig_t configuration(const Grid& grid, Stream stream, Attributes& attributes) {
  cudaLaunchConfig_t made = {};
  if (grid.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[made.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1, static_cast<unsigned>(grid.cluster), 1};
  }
  if (grid.early) {
    cudaLaunchAttribute& early = attributes[made.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  made.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  made.blockDim = dim3(grid.threads);
  made.dynamicSmemBytes = grid.shared_memory;
  made.stream = stream;
  made.attrs = attributes.data();
  return made;
}

void allow_shared_memory(const void* kernel, const Grid& grid) {
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_memory),
      "asking for shared memory");
}

// The driver's function, asked for at run time so that nothing links against the driver.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &result),
          "looking for cuTensorMapEncodeTiled");
    GRASP_CHECK(result == cudaDriverEntryPointSuccess,
                "the NVIDIA driver has no tensor maps; update it to one for CUDA 12 or newer.");
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return found;
}

}  // namespace

Properties properties(int device) {
  constexpr int kMost = 64;
  GRASP_CHECK(0 <= device && device < kMost, "device ", device, " is not one of ", kMost, ".");
  static std::array<std::once_flag, kMost> known;
  static std::array<Properties, kMost> found;
  std::call_once(known[device], [device] {
    const auto read = [device](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, device), "reading the properties of a GPU");
      return value;
    };
    found[device] = {device, read(cudaDevAttrComputeCapabilityMajor),
                     read(cudaDevAttrMultiProcessorCount),
                     read(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return found[device];
}

Stream current_stream(int device) {
  GRASP_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA.");
  void* stream = nullptr;
  GRASP_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
              "torch has no current stream on device ", device, ".");
  return static_cast<Stream>(stream);
}

OnDevice::OnDevice(int device) {
  check(cudaGetDevice(&before_), "asking for the current GPU");
  check(cudaSetDevice(device), "choosing a GPU");
}

OnDevice::~OnDevice() { cudaSetDevice(before_); }

TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t row_bytes,
                     int box_rows, bool is_bf16) {
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result = encode_tiled()(
      &map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  GRASP_CHECK(result == CUDA_SUCCESS, "a tensor map of ", rows, " × ", columns, " elements, rows ",
              row_bytes, " bytes apart, was refused with error ", static_cast<int>(result), ".");
  return map;
}

namespace erased {

int clusters_at_once(const void* kernel, const Grid& grid) {
  allow_shared_memory(kernel, grid);
  Attributes attributes;
  const cudaLaunchConfig_t made = configuration(grid, nullptr, attributes);
  int found = 0;
  if (grid.cluster > 1) {
    check(cudaOccupancyMaxActiveClusters(&found, kernel, &made), "counting clusters");
    return found;
  }
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current GPU");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, grid.threads,
                                                      grid.shared_memory),
        "counting blocks");
  return found * properties(device).multiprocessors;
}

int compiled_for(const void* kernel) {
  cudaFuncAttributes found;
  if (cudaFuncGetAttributes(&found, kernel) != cudaSuccess) {
    cudaGetLastError();  // there is no code for the device, which is an answer and no error
    return 0;
  }
  return found.ptxVersion;
}

void launch(const void* kernel, const Grid& grid, Stream stream, void* argument) {
  if (grid.x == 0 || grid.y == 0) return;
  allow_shared_memory(kernel, grid);
  Attributes attributes;
  const cudaLaunchConfig_t made = configuration(grid, stream, attributes);
  void* arguments[] = {argument};
  check(cudaLaunchKernelExC(&made, kernel, arguments), "launching a kernel");
}

}  // namespace erased
}  // namespace grasp::device
