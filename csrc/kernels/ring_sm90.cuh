// Tiles in flight, Hopper: one warp asks the copy engine for tiles, barriers in shared memory pass
// each stage to the groups that work on it and back.

#pragma once

#include "kernels/arguments.h"
#include "kernels/layout.cuh"

namespace grasp {

template <int kIndex>
class RingSm90 {
  static constexpr Shape S = SHAPES[kIndex];

 public:
  __device__ RingSm90(const PassArguments& a, const Steps<kIndex>& steps) : a_(a), steps_(steps) {}

  // By one thread, before any other use.
  __device__ void init() {
    for (int stage = 0; stage < S.stages; ++stage) {
      device::barrier_init(full(stage), 1);
      device::barrier_init(empty(stage), S.consumers() / 32);
    }
  }

  // All of the work of the copying thread.
  __device__ void fill() {
    device::prefetch(&a_.z_map);
    device::prefetch(S.sums() ? &a_.left_map : &a_.factor_map);
    for (int i = 0; i < steps_.count; ++i) {
      device::barrier_wait(empty(i), ~(i / S.stages) & 1);  // the first round is empty at once
      device::barrier_arrive_expect(full(i), S.stage_bytes());
      load(i);
    }
  }

  __device__ char* acquire(int i) {
    device::barrier_wait(full(i), i / S.stages & 1);
    return shared_.stage(i);
  }

  // The warp is through with the stage of step i.
  __device__ void release(int i) {
    device::warp_sync();
    if (threadIdx.x % 32 == 0) device::barrier_arrive(empty(i));
  }

 private:
  __device__ void load(int i) {
    char* stage = shared_.stage(i);
    const int token = static_cast<int>(steps_.token_of(i));
    const int column = static_cast<int>(steps_.column_of(i));
    for (int block = 0; block < S.groups * S.blocks; ++block) {
      const int first = column + kWide * block;
      device::copy_box(stage + block * kTokens * kRowBytes, &a_.z_map, full(i), first, token);
      if (!S.sums()) {
        device::copy_box(shared_.beside(stage) + block * S.E * kRowBytes, &a_.factor_map, full(i),
                         first, 0);
      }
    }
    if (S.sums()) device::copy_box(shared_.beside(stage), &a_.left_map, full(i), token, 0);
  }

  __device__ device::Barrier* full(int i) const { return shared_.barrier(i % S.stages); }
  __device__ device::Barrier* empty(int i) const {
    return shared_.barrier(S.stages + i % S.stages);
  }

  const PassArguments& a_;
  const Steps<kIndex>& steps_;
  Shared<kIndex> shared_;
};

}  // namespace grasp
