#include "plan.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

namespace grasp {
namespace {

constexpr int kMostInCluster = 8;  // that every part allows
// What a block does before its first tile and after its last, in tiles. Not measured yet.
constexpr int64_t kStart = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int arch_of(int major) { return major == 9 ? 90 : 80; }

// How many blocks share `tiles`, when `others` do so side by side and `active` run at once: the
// longest chain of tiles on one multiprocessor is the time of the pass, and one partial result more
// counts as a tile.
int64_t best_splits(int64_t others, int64_t tiles, int64_t active, int64_t most) {
  const auto cost = [=](int64_t splits) {
    return ceil_div(others * splits, active) * (ceil_div(tiles, splits) + kStart) + splits;
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= most; ++splits) {
    if (cost(splits) < cost(best)) best = splits;
  }
  return best;
}

// Blocks of a kernel that run at once; asking the runtime takes longer than a launch.
int64_t active_blocks(PassKernel kernel, const device::Grid& grid, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<PassKernel, int, int>, int> known;
  const std::lock_guard lock(mutex);
  const auto key = std::make_tuple(kernel, grid.cluster, device);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const int active = std::max(1, device::clusters_at_once(kernel, grid)) * grid.cluster;
  known.emplace(key, active);
  return active;
}

Plan with_kernel(int index, bool is_bf16) {
  const Shape& shape = SHAPES[index];
  return {pass_kernel_of(index, is_bf16),
          index,
          {1, 1, 1, shape.threads(), shape.shared_memory()},
          0,
          1};
}

}  // namespace

bool runs_on(const device::Properties& part) {
  const int index = shape_for(Kind::down, part.major, 0, 1);
  // Code for Ampere, which a Hopper would run too, has no kernels of Hopper in it.
  return device::compiled_for(pass_kernel_of(index, true)) / 10 >= SHAPES[index].arch / 10;
}

int shape_for(Kind kind, int major, int R, int E) {
  for (int index = 0; index < kShapes; ++index) {
    const Shape& shape = SHAPES[index];
    if (shape.kind == kind && shape.arch == arch_of(major) && R <= shape.R && E <= shape.E) {
      return index;
    }
  }
  return -1;
}

int gradient_parts(int major, int64_t C, int R, int E) {
  const int index = shape_for(Kind::gradient, major, R, E);
  if (index < 0) return 0;
  return static_cast<int>(ceil_div(C, SHAPES[index].columns()));
}

Plan plan_sums(Kind kind, const device::Properties& part, int64_t T, int64_t C, int R, int E,
               bool is_bf16) {
  const int index = shape_for(kind, part.major, R, E);
  const Shape& shape = SHAPES[index];
  const int64_t slabs = ceil_div(C, shape.columns()), tiles = ceil_div(T, kTokens);
  Plan plan = with_kernel(index, is_bf16);
  plan.grid.y = slabs;
  const int64_t active = active_blocks(plan.kernel, plan.grid, part.device);
  const int64_t splits = best_splits(plan.grid.y, tiles, active, std::min(tiles, active));
  plan.steps = static_cast<int>(ceil_div(tiles, splits));
  plan.grid.x = ceil_div(tiles, plan.steps);
  plan.parts = static_cast<int>(slabs);
  return plan;
}

Plan plan_down(const device::Properties& part, int64_t T, int64_t C, int E, bool is_bf16) {
  const int index = shape_for(Kind::down, part.major, 0, E);
  const Shape& shape = SHAPES[index];
  const int64_t blocks = ceil_div(T, kTokens), tiles = ceil_div(C, shape.columns());
  Plan plan = with_kernel(index, is_bf16);
  const int64_t active = active_blocks(plan.kernel, plan.grid, part.device);
  // Fewer than four tiles would not fill the pipeline before they are over.
  int64_t splits = best_splits(blocks, tiles, active, std::min(tiles / 4, active));
  if (shape.arch == 90) {
    while (2 * plan.grid.cluster <= std::min<int64_t>(splits, kMostInCluster)) {
      plan.grid.cluster *= 2;
    }
    splits -= splits % plan.grid.cluster;
  }
  plan.steps = static_cast<int>(ceil_div(tiles, splits));
  plan.grid.x = blocks;
  plan.grid.y = ceil_div(ceil_div(tiles, plan.steps), plan.grid.cluster) * plan.grid.cluster;
  plan.parts = static_cast<int>(plan.grid.y / plan.grid.cluster);
  return plan;
}

}  // namespace grasp
