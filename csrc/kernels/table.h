// The compiled kernels, by place in SHAPES and by element type.

#pragma once

#include "kernels/arguments.h"
#include "kernels/shapes.h"

namespace grasp {

using PassKernel = void (*)(PassArguments);
using FinishKernel = void (*)(FinishArguments);

// One translation unit a kind, so that they compile side by side; null for shapes of other kinds.
PassKernel gradient_kernel(int index, bool is_bf16);
PassKernel input_kernel(int index, bool is_bf16);
PassKernel down_kernel(int index, bool is_bf16);
FinishKernel finish_kernel_of(bool is_bf16);

inline PassKernel pass_kernel_of(int index, bool is_bf16) {
  switch (SHAPES[index].kind) {
    case Kind::gradient:
      return gradient_kernel(index, is_bf16);
    case Kind::input:
      return input_kernel(index, is_bf16);
    default:
      return down_kernel(index, is_bf16);
  }
}

}  // namespace grasp
