#include "kernels/finish.cuh"
#include "kernels/table.h"

namespace grasp {

FinishKernel finish_kernel_of(bool is_bf16) {
  return is_bf16 ? finish_kernel<device::bf16> : finish_kernel<device::fp16>;
}

}  // namespace grasp
