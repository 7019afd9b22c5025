// What the emulator knows of a matrix that boxes are copied from.

#pragma once

#include <cstdint>

namespace grasp::device {

struct alignas(64) TensorMap {
  const char* base;
  int64_t rows, columns, row_bytes;
  int box_rows;
};

}  // namespace grasp::device
