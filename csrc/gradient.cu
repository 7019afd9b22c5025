#include "kernels/instances.cuh"

namespace grasp {

PassKernel gradient_kernel(int index, bool is_bf16) {
  return kernel_of_kind<Kind::gradient>(index, is_bf16);
}

}  // namespace grasp
