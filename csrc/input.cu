#include "kernels/instances.cuh"

namespace grasp {

PassKernel input_kernel(int index, bool is_bf16) {
  return kernel_of_kind<Kind::input>(index, is_bf16);
}

}  // namespace grasp
