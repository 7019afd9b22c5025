// How skinny tiles get from those that compute them to those that add them.
//
// A tile goes through four points: its buffer is drained, it is filled, it is read, and drained
// again. On Ampere the threads that compute add too. On Hopper the warps beside them add in a
// gradient pass, whose loop thus waits for nobody; in a down pass, which has one tile, the blocks
// of a cluster that share its tokens do.

#pragma once

#include "kernels/layout.cuh"

namespace grasp {

template <int kIndex>
class ExchangeSm80 {
  static constexpr Shape S = SHAPES[kIndex];
  Shared<kIndex> shared_;

 public:
  __device__ void init() {}
  __device__ int rank() const { return 0; }
  __device__ int blocks() const { return 1; }
  __device__ void wait_drained(int) const { device::named_barrier(1, S.consumers()); }
  __device__ void arrive_filled(int) const {}
  __device__ void wait_filled(int) const { device::named_barrier(1, S.consumers()); }
  __device__ void arrive_drained(int) const {}
  __device__ float4 load(int i, int offset, int) const {
    return *reinterpret_cast<const float4*>(shared_.skinny(i) + offset);
  }
};

template <int kIndex>
class ExchangeAside {
  static constexpr Shape S = SHAPES[kIndex];
  Shared<kIndex> shared_;

 public:
  __device__ explicit ExchangeAside(int) {}

  // By one thread, before any other use.
  __device__ void init() {
    for (int buffer = 0; buffer < S.buffers; ++buffer) {
      device::barrier_init(filled(buffer), S.consumers() / 32);
      device::barrier_init(drained(buffer), S.adders() / 32);
    }
  }
  __device__ int rank() const { return 0; }
  __device__ int blocks() const { return 1; }

  __device__ void wait_drained(int i) const {
    device::barrier_wait(drained(i), ~(i / S.buffers) & 1);  // the first round is drained at once
  }
  __device__ void arrive_filled(int i) const { arrive(filled(i)); }
  __device__ void wait_filled(int i) const { device::barrier_wait(filled(i), i / S.buffers & 1); }
  __device__ void arrive_drained(int i) const { arrive(drained(i)); }
  __device__ float4 load(int i, int offset, int) const {
    return *reinterpret_cast<const float4*>(shared_.skinny(i) + offset);
  }

 private:
  // Once a warp.
  __device__ void arrive(device::Barrier* barrier) const {
    device::warp_sync();
    if (threadIdx.x % 32 == 0) device::barrier_arrive(barrier);
  }
  __device__ device::Barrier* filled(int i) const {
    return shared_.barrier(2 * S.stages + i % S.buffers);
  }
  __device__ device::Barrier* drained(int i) const {
    return shared_.barrier(2 * S.stages + S.buffers + i % S.buffers);
  }
};

template <int kIndex>
class ExchangeInCluster {
  static constexpr Shape S = SHAPES[kIndex];
  Shared<kIndex> shared_;
  int blocks_;

 public:
  __device__ explicit ExchangeInCluster(int cluster) : blocks_(cluster) {}

  // By one thread, before any other use.
  __device__ void init() {
    if (S.skinny()) device::barrier_init(filled(), blocks_ * S.consumers() / 32);
  }
  __device__ int rank() const { return device::cluster_rank(); }
  __device__ int blocks() const { return blocks_; }

  __device__ void wait_drained(int) const {}
  // Once a warp, at every block of the cluster.
  __device__ void arrive_filled(int) const {
    device::warp_sync();
    const int lane = threadIdx.x % 32;
    if (lane < blocks_) device::barrier_arrive_remote(filled(), lane);
  }
  __device__ void wait_filled(int) const { device::barrier_wait(filled(), 0); }
  __device__ void arrive_drained(int) const {}

  // Four floats of the tile of another block.
  __device__ float4 load(int i, int offset, int rank) const {
    return device::load_remote(shared_.skinny(i) + offset, rank);
  }

 private:
  __device__ device::Barrier* filled() const { return shared_.barrier(2 * S.stages); }
};

}  // namespace grasp
