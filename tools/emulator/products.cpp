#include "products.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "machine.h"

namespace grasp::emulator {
namespace {

using device::erased::Product;

constexpr int kRows = 16, kDepth = 16;

template <bool kBf16>
float as_float(uint16_t bits) {
  using T = std::conditional_t<kBf16, device::bf16, device::fp16>;
  return static_cast<float>(T(bits, T::from_bits()));
}

uint32_t start_address(uint64_t descriptor) { return (descriptor & 0x3fff) << 4; }

// Eight elements of an operand: those from chunk `chunk` on in its line of 128 bytes.
struct Lines {
  const Block& block;
  uint32_t start;

  const uint16_t* operator()(int line, int chunk) const {
    const uint32_t address = swizzle(start + line / 8 * 1024 + line % 8 * 128 + chunk * 16);
    const char* at = block.shared + (static_cast<int64_t>(address) - device::kSharedWindow);
    block.offset(at, 16, 16);
    return reinterpret_cast<const uint16_t*>(at);
  }
};

// The sixteen rows of the warp.
template <bool kBf16>
void load_a(const Lines& lines, int warp, bool transposed, float (&a)[kRows][kDepth]) {
  for (int line = 0; line < 16; ++line) {
    for (int half = 0; half < 2; ++half) {
      const uint16_t* from =
          transposed ? lines(line, 2 * warp + half) : lines(kRows * warp + line, half);
      for (int i = 0; i < 8; ++i) {
        float& to = transposed ? a[8 * half + i][line] : a[line][8 * half + i];
        to = as_float<kBf16>(from[i]);
      }
    }
  }
}

template <bool kBf16, int kColumns>
void load_b(const Lines& lines, float (&b)[kDepth][kColumns]) {
  for (int column = 0; column < kColumns; ++column) {
    for (int half = 0; half < 2; ++half) {
      const uint16_t* from = lines(column, half);
      for (int i = 0; i < 8; ++i) b[8 * half + i][column] = as_float<kBf16>(from[i]);
    }
  }
}

template <bool kBf16, int kColumns>
void multiply_columns(const Block& block, int warp, const Product& product, float* out) {
  float a[kRows][kDepth], b[kDepth][kColumns];
  load_a<kBf16>({block, start_address(product.a)}, warp, product.transposed, a);
  load_b<kBf16>({block, start_address(product.b)}, b);
  for (int row = 0; row < kRows; ++row) {
    float sums[kColumns] = {};
    for (int k = 0; k < kDepth; ++k) {
      const float factor = a[row][k];
      for (int column = 0; column < kColumns; ++column) sums[column] += factor * b[k][column];
    }
    std::memcpy(out + row * kColumns, sums, sizeof sums);
  }
}

template <int kColumns>
void multiply_any(const Block& block, int warp, const Product& product, float* out) {
  if (product.is_bf16) return multiply_columns<true, kColumns>(block, warp, product, out);
  multiply_columns<false, kColumns>(block, warp, product, out);
}

// Visits the accumulators of all lanes with their places in a row-major tile.
template <typename Lanes, typename Visit>
void each_accumulator(const Lanes& lanes, int blocks, Visit visit) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int j = 0; j < blocks; ++j) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
        visit(lanes[lane][j][i], row * 8 * blocks + column);
      }
    }
  }
}

bool same(const Product& x, const Product& y) {
  return x.a == y.a && x.b == y.b && x.blocks == y.blocks && x.is_bf16 == y.is_bf16 &&
         x.transposed == y.transposed && x.add == y.add;
}

// A line of 128 bytes holds all of what an operand has of it.
void check_columns(const Product& product) {
  const uint32_t a = start_address(product.a) % 128, b = start_address(product.b) % 128;
  if (a > (product.transposed ? 0 : 96) || b > 96) {
    fail("an operand of wgmma reaches past the end of its lines of 128 bytes");
  }
}

// All four warps of a group must issue the same products.
void check_order(Warp& warp, const Product& product) {
  IssueOrder& order = warp.block->issued[warp.index / 4];
  std::size_t& done = order.done[warp.index % 4];
  if (done == order.products.size()) order.products.push_back(product);
  if (!same(order.products[done], product)) {
    fail("divergence: the warps of a group issue different wgmma");
  }
  ++done;
}

}  // namespace

void Products::Tile::load() {
  each_accumulator(lanes, blocks, [this](float& lane, int at) { values[at] = lane; });
}

void Products::Tile::store() const {
  each_accumulator(lanes, blocks, [this](float& lane, int at) { lane = values[at]; });
}

void Products::Tile::poison() const {
  each_accumulator(lanes, blocks,
                   [](float& lane, int) { lane = std::numeric_limits<float>::quiet_NaN(); });
}

void Products::issue(Warp& warp, const Product& product,
                     const std::array<Accumulators, 32>& accumulators) {
  if (!fenced_) fail("wgmma before the first wgmma_fence of the warp");
  check_columns(product);
  check_order(warp, product);
  auto pending = std::make_unique<Pending>();
  pending->product = product;
  pending->tile = &tile(accumulators, product.blocks);
  ++pending->tile->pending;
  if (!machine().adversary().late()) multiply(warp, *pending);
  open_.push_back(std::move(pending));
}

void Products::commit() {
  groups_.push_back(std::move(open_));
  open_.clear();
}

void Products::wait(Warp& warp, std::size_t pending) {
  while (groups_.size() > pending) {
    for (auto& product : groups_.front()) end(warp, *product);
    groups_.pop_front();
  }
}

void Products::forget() { *this = {}; }

// Accumulators of products under way may be those of a further product of the same shape only.
Products::Tile& Products::tile(const std::array<Accumulators, 32>& accumulators, int blocks) {
  for (const auto& tile : tiles_) {
    if (tile->lanes == accumulators && tile->blocks == blocks) return *tile;
    if (accumulators[0] < tile->lanes[0] + tile->blocks &&
        tile->lanes[0] < accumulators[0] + blocks) {
      fail("wgmma on accumulators that products of another shape are writing to");
    }
  }
  tiles_.push_back(std::make_unique<Tile>());
  Tile& made = *tiles_.back();
  made.lanes = accumulators;
  made.blocks = blocks;
  made.load();
  made.poison();
  return made;
}

void Products::multiply(const Warp& warp, Pending& pending) {
  const Block& block = *warp.block;
  const int quarter = warp.index % 4;
  switch (pending.product.blocks) {
    case 2:
      multiply_any<16>(block, quarter, pending.product, pending.values.data());
      break;
    case 4:
      multiply_any<32>(block, quarter, pending.product, pending.values.data());
      break;
    default:
      multiply_any<64>(block, quarter, pending.product, pending.values.data());
  }
  pending.done = true;
}

void Products::end(const Warp& warp, Pending& pending) {
  Tile& tile = *pending.tile;
  if (!pending.done) multiply(warp, pending);
  for (int i = 0; i < kRows * 8 * tile.blocks; ++i) {
    tile.values[i] = (pending.product.add ? tile.values[i] : 0.0f) + pending.values[i];
  }
  if (--tile.pending > 0) return;
  tile.store();
  std::erase_if(tiles_, [&tile](const auto& other) { return other.get() == &tile; });
}

}  // namespace grasp::emulator
