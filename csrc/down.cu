#include "kernels/instances.cuh"

namespace grasp {

PassKernel down_kernel(int index, bool is_bf16) {
  return kernel_of_kind<Kind::down>(index, is_bf16);
}

}  // namespace grasp
