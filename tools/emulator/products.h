// The products of wgmma that a warp has under way.
//
// PTX makes the lanes of a warp wait for each other at wgmma, and lets the four warps of a group
// come when they come. So each warp does its 16 rows by itself, and a kernel that takes wgmma for a
// barrier of the group goes wrong.

#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "device/primitives.cuh"

namespace grasp::emulator {

struct Warp;

// The wgmmas of a warpgroup in order, so that its four warps can be held to the same ones.
struct IssueOrder {
  std::vector<device::erased::Product> products;
  std::array<std::size_t, 4> done = {};  // by each of the warps
};

class Products {
 public:
  using Accumulators = float (*)[4];

  void fence() { fenced_ = true; }
  void issue(Warp& warp, const device::erased::Product& product,
             const std::array<Accumulators, 32>& accumulators);
  void commit();
  // Ends all groups but the `pending` last.
  void wait(Warp& warp, std::size_t pending);
  bool idle() const { return open_.empty() && groups_.empty(); }
  void forget();

 private:
  static constexpr int kRows = 16, kMostColumns = 64;

  // The accumulators of a warp. Registers of products under way are undefined, so the lanes see NaN
  // while the values are here.
  struct Tile {
    std::array<Accumulators, 32> lanes;
    int blocks;
    int pending = 0;  // products
    std::array<float, kRows * kMostColumns> values;

    void load();
    void store() const;
    void poison() const;
  };

  struct Pending {
    device::erased::Product product;
    Tile* tile;
    bool done = false;
    std::array<float, kRows * kMostColumns> values;  // of the product, once done
  };

  using Group = std::vector<std::unique_ptr<Pending>>;

  Tile& tile(const std::array<Accumulators, 32>& accumulators, int blocks);
  static void multiply(const Warp& warp, Pending& pending);
  void end(const Warp& warp, Pending& pending);

  bool fenced_ = false;
  std::vector<std::unique_ptr<Tile>> tiles_;
  Group open_;
  std::deque<Group> groups_;
};

}  // namespace grasp::emulator
