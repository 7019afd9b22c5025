// Which kernel a pass takes, and how its work is cut into blocks.
//
// Shapes: T tokens, C columns of Z, R LoRA rank, E rows of the skinny result.

#pragma once

#include <cstdint>

#include "kernels/table.h"

namespace grasp {

struct Plan {
  PassKernel kernel;
  int index;  // of the shape
  device::Grid grid;
  int steps;  // tiles of a block
  int parts;  // of the skinny result, one a slab or a cluster; 1: it is finished

  const Shape& shape() const { return SHAPES[index]; }
  int64_t splits() const { return grid.x; }  // of the tokens, in a sum over them
};

// Whether there is code for the current device.
bool runs_on(const device::Properties& part);

// The place in SHAPES of the smallest shape that takes R and E, or −1.
int shape_for(Kind kind, int major, int R, int E);

// The current device's plan; the kind must have a shape that takes R and E.
Plan plan_sums(Kind kind, const device::Properties& part, int64_t T, int64_t C, int R, int E,
               bool is_bf16);
Plan plan_down(const device::Properties& part, int64_t T, int64_t C, int E, bool is_bf16);

// Partial skinny results that a gradient pass would leave; 0 if no shape takes it.
int gradient_parts(int major, int64_t C, int R, int E);

}  // namespace grasp
