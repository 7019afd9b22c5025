// The skinny result: tiles [E, 64 tokens] of the groups and blocks that share its tokens, added in
// a fixed order and written once, by the block or by its cluster.

#pragma once

#include "kernels/arguments.h"
#include "kernels/layout.cuh"

namespace grasp {

// The resident F of a gradient pass, [E, columns of the slab], from B° and the basis.
template <typename T, int kIndex>
__device__ void load_factor(const PassArguments& a, const Shared<kIndex>& shared, const Place& at,
                            int64_t column) {
  constexpr Shape S = SHAPES[kIndex];
  constexpr int kOwn = kWide * S.blocks;  // columns of a group
  const T* factor = static_cast<const T*>(a.factor.data);
  char* own = shared.factor() + at.group * S.blocks * S.E * kRowBytes;
  for (int unit = at.thread % kGroup; unit < S.E * kOwn; unit += kGroup) {
    const int e = unit / kOwn, c = unit % kOwn;
    const int64_t from = column + at.group * kOwn + c;
    T value = T(0.0f);
    if (from < a.C && e < a.R) {
      value = factor[from * a.factor.row + e * a.factor.column];
    } else if (from < a.C && e < a.E) {
      value = T(a.basis.data[from * a.basis.row + (e - a.R) * a.basis.column]);
    }
    char* block = own + c / kWide * S.E * kRowBytes;
    *reinterpret_cast<T*>(block + chunk_offset(e, c % kWide / 8) + c % 8 * 2) = value;
  }
  device::fence_async_proxy();
  device::named_barrier(2 + at.group, kGroup);
}

// A group's product of step i into its part of the buffer.
template <int kIndex>
__device__ void store_skinny(const Shared<kIndex>& shared, const Place& at, int i,
                             const float (&acc)[SHAPES[kIndex].E / 8][4]) {
  constexpr Shape S = SHAPES[kIndex];
  float* own = shared.skinny(i) + at.group * S.E * kSkinnyStride;
  const int token = 16 * at.warp + at.lane / 4, first = at.lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < S.E / 8; ++j) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      own[(8 * j + first + n % 2) * kSkinnyStride + token + n / 2 * 8] = acc[j][n];
    }
  }
}

template <typename T>
struct alignas(8) Four {
  T values[4];
};

// Four neighbouring results, finished or not; those behind the last token are left out.
template <typename T>
__device__ void write_skinny(const PassArguments& a, int part, int e, int64_t token, float4 sum) {
  const float scale = !a.finished ? 1.0f : e < a.n_scaled ? a.scaling : -1.0f;
  const float values[] = {scale * sum.x, scale * sum.y, scale * sum.z, scale * sum.w};
  const int64_t at = (a.finished ? e : int64_t(part) * a.E + e) * a.T + token;
  float* parts = static_cast<float*>(a.skinny) + at;
  T* results = static_cast<T*>(a.skinny) + at;
  if (a.T % 4 == 0 && token < a.T) {
    if (a.finished) {
      *reinterpret_cast<Four<T>*>(results) = {T(values[0]), T(values[1]), T(values[2]),
                                              T(values[3])};
    } else {
      *reinterpret_cast<float4*>(parts) = sum;
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    if (token + n >= a.T) break;
    if (a.finished) {
      results[n] = T(values[n]);
    } else {
      parts[n] = values[n];
    }
  }
}

// This block's share of what its cluster wrote in step i: groups and blocks in their order.
template <typename T, int kIndex, typename Exchange>
__device__ void reduce_skinny(const PassArguments& a, const Exchange& exchange, int i,
                              int64_t token) {
  constexpr Shape S = SHAPES[kIndex];
  constexpr int kQuads = kTokens / 4;
  const int share = (a.E * kQuads + exchange.blocks() - 1) / exchange.blocks();
  const int first = exchange.rank() * share, last = min(a.E * kQuads, first + share);
  const int part = blockIdx.y / exchange.blocks(), thread = threadIdx.x - S.first_adder();
  for (int unit = first + thread; unit < last; unit += S.adders()) {
    const int e = unit / kQuads, quad = unit % kQuads;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4  // loads from other blocks take long; several are under way
    for (int rank = 0; rank < exchange.blocks(); ++rank) {
#pragma unroll
      for (int group = 0; group < S.groups; ++group) {
        const float4 one = exchange.load(i, (group * S.E + e) * kSkinnyStride + 4 * quad, rank);
        sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
      }
    }
    write_skinny<T>(a, part, e, token + 4 * quad, sum);
  }
}

}  // namespace grasp
