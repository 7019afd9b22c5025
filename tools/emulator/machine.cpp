#include "machine.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace grasp::emulator {
namespace {

constexpr std::size_t kBoundary = 1024;  // that shared memory begins at
constexpr std::size_t kGuard = 1024;     // bytes on either side of it that nothing may change
constexpr char kGuardByte = 0x5a;

// Stands in the eight bytes of an initialised mbarrier, to see that nothing else is written there.
constexpr uint64_t kBarrier = 0x6d62617272696572;

// A thread has at first what its compiler could give it: an equal part, in steps of 8.
int first_registers(std::size_t warps) {
  return std::min<int>(256, 65536 / (kWarp * static_cast<int>(warps)) / 8 * 8);
}

Machine* running = nullptr;

std::string tuple(unsigned x, unsigned y) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ")";
}

void copy_sixteen(const AsyncCopy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

void settle(Phases& barrier) {
  if (barrier.arrivals > 0 || barrier.bytes > 0) return;
  if (barrier.bytes < 0) {
    fail("an mbarrier got " + std::to_string(-barrier.bytes) + " bytes more than it expects");
  }
  barrier.arrivals = barrier.count;
  barrier.parity ^= 1;
  for (Thread* thread : std::exchange(barrier.waiting, {})) machine().wake(*thread);
}

}  // namespace

Machine& machine() { return *running; }

void fail(const std::string& what) {
  const Thread* thread = running != nullptr ? running->current() : nullptr;
  if (thread == nullptr) throw std::runtime_error("emulator: " + what + ".");
  const Block& block = *thread->warp->block;
  throw std::runtime_error("emulator: " + what + " (thread " +
                           std::to_string(thread->warp->index * kWarp + thread->lane) +
                           " of block " + tuple(block.x, block.y) + ").");
}

bool Operation::operator==(const Operation& other) const {
  return name == other.name && detail == other.detail;  // each is named in one place only
}

std::string Operation::describe() const {
  std::string text = name;
  for (int i = 0; i < details; ++i) text += (i == 0 ? "(" : ", ") + std::to_string(detail[i]);
  return details == 0 ? text : text + ")";
}

uint64_t Adversary::below(uint64_t bound) {
  state_ += 0x9e3779b97f4a7c15;  // splitmix64
  uint64_t mixed = state_;
  mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9;
  mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111eb;
  return (mixed ^ mixed >> 31) % bound;
}

bool Adversary::late() {
  if (orderly()) return false;
  return seed_ % 2 == 1 || below(2) == 1;
}

void arrive(Phases& barrier) {
  if (barrier.arrivals == 0) fail("more arrivals at an mbarrier than it was initialised for");
  --barrier.arrivals;
  settle(barrier);
}

void bring(Phases& barrier, int64_t bytes) {
  barrier.bytes -= bytes;
  settle(barrier);
}

void finish_copies(Thread& thread, std::size_t pending) {
  while (thread.groups.size() > pending) {
    for (const AsyncCopy& copy : thread.groups.front()) copy_sixteen(copy);
    thread.groups.pop_front();
  }
}

// ---- blocks -----------------------------------------------------------------------------------

Block::Block(int threads, int shared_bytes)
    : shared_bytes(shared_bytes),
      warps(threads / kWarp),
      issued((threads + 127) / 128),
      memory_(kBoundary + 2 * kGuard + shared_bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
  shared = memory_.data() + kGuard + (kBoundary - begin % kBoundary) % kBoundary;
}

void Block::start(unsigned x, unsigned y, int rank, void (*entry)()) {
  std::fill(memory_.begin(), memory_.end(), kGuardByte);
  std::memset(shared, kPoison, shared_bytes);
  this->x = x;
  this->y = y;
  this->rank = rank;
  alive = static_cast<int>(warps.size()) * kWarp;
  barriers.clear();
  named = {};
  for (IssueOrder& order : issued) order = {};
  spare_registers_ = 0;
  claims_.clear();
  for (std::size_t w = 0; w < warps.size(); ++w) {
    Warp& warp = warps[w];
    warp.block = this;
    warp.index = static_cast<int>(w);
    warp.alive = kWarp;
    warp.registers = first_registers(warps.size());
    warp.ready = ~uint32_t(0);
    warp.arrived = 0;
    warp.products.forget();
    for (int lane = 0; lane < kWarp; ++lane) {
      Thread& thread = warp.lanes[lane];
      thread.warp = &warp;
      thread.lane = lane;
      thread.blocked = thread.finished = false;
      thread.copies.clear();
      thread.groups.clear();
      thread.fiber.start(entry);
    }
  }
}

uint32_t Block::offset(const void* pointer, std::size_t bytes, std::size_t alignment) const {
  const auto at = reinterpret_cast<intptr_t>(pointer) - reinterpret_cast<intptr_t>(shared);
  if (at < 0 || at + static_cast<intptr_t>(bytes) > shared_bytes) {
    fail("bytes " + std::to_string(at) + " to " + std::to_string(at + intptr_t(bytes)) +
         " are outside of the shared memory of " + std::to_string(shared_bytes) + " bytes");
  }
  if (at % static_cast<intptr_t>(alignment) != 0) {
    fail("misaligned address: byte " + std::to_string(at) +
         " of shared memory is not at a multiple of " + std::to_string(alignment));
  }
  return static_cast<uint32_t>(at);
}

void Block::init_barrier(uint32_t offset, int arrivals) {
  if (!barriers.try_emplace(offset, Phases{arrivals, arrivals, 0, 0, {}}).second) {
    fail("the mbarrier at byte " + std::to_string(offset) + " is initialised twice");
  }
  std::memcpy(shared + offset, &kBarrier, sizeof kBarrier);
}

Phases& Block::barrier(uint32_t offset) {
  const auto found = barriers.find(offset);
  if (found == barriers.end()) {
    fail("no mbarrier is initialised at byte " + std::to_string(offset) + " of shared memory");
  }
  if (std::memcmp(shared + offset, &kBarrier, sizeof kBarrier) != 0) {
    fail("the mbarrier at byte " + std::to_string(offset) + " of shared memory was overwritten");
  }
  return found->second;
}

void Block::give_registers(Warp& warp, int count) {
  if (count > warp.registers) {
    fail("a thread of " + std::to_string(warp.registers) + " registers cannot go down to " +
         std::to_string(count));
  }
  spare_registers_ += warp.registers - count;
  warp.registers = count;
  serve_claims();
}

void Block::take_registers(Warp& warp, int count) {
  if (count < warp.registers) {
    fail("a thread of " + std::to_string(warp.registers) + " registers cannot go up to " +
         std::to_string(count));
  }
  claims_.push_back({&warp, count - warp.registers});
  warp.registers = count;
  serve_claims();
}

void Block::serve_claims() {
  std::erase_if(claims_, [this](const Claim& claim) {
    if (claim.registers > spare_registers_) return false;
    spare_registers_ -= claim.registers;
    machine().release(*claim.warp);
    return true;
  });
}

// wgmma and changes of registers are those of whole groups of four warps.
void Block::check_groups() const {
  for (const IssueOrder& order : issued) {
    for (const std::size_t done : order.done) {
      if (done != order.products.size()) {
        fail("divergence: the warps of a group in block " + tuple(x, y) +
             " issued different numbers of wgmma");
      }
    }
  }
  const int first = first_registers(warps.size());
  for (std::size_t w = 0; w < warps.size(); ++w) {
    const std::size_t group = w / 4 * 4;
    if (warps[w].registers != warps[group].registers ||
        (warps[w].registers != first && group + 4 > warps.size())) {
      fail("divergence: not all four warps of a group in block " + tuple(x, y) +
           " gave or took registers");
    }
  }
}

void Block::check_end() const {
  const char* end = shared + shared_bytes;
  const auto kept = [](char byte) { return byte == kGuardByte; };
  if (!std::all_of(memory_.data(), static_cast<const char*>(shared), kept) ||
      !std::all_of(end, memory_.data() + memory_.size(), kept)) {
    fail("block " + tuple(x, y) + " wrote outside of its shared memory");
  }
  for (const auto& [offset, barrier] : barriers) {
    if (barrier.bytes != 0) {
      fail("block " + tuple(x, y) + " ended while the mbarrier at byte " + std::to_string(offset) +
           " waited for " + std::to_string(barrier.bytes) + " bytes");
    }
  }
  check_groups();
}

// ---- threads ----------------------------------------------------------------------------------

Machine::Machine(const device::Grid& grid, const std::function<void()>& kernel,
                 Adversary& adversary)
    : kernel_(kernel), adversary_(adversary) {
  for (int rank = 0; rank < grid.cluster; ++rank) {
    blocks_.push_back(std::make_unique<Block>(grid.threads, grid.shared_memory));
  }
  running = this;
}

Machine::~Machine() { running = nullptr; }

Block& Machine::block(int rank) {
  if (rank < 0 || rank >= static_cast<int>(blocks_.size())) {
    fail("there is no block " + std::to_string(rank) + " in the cluster");
  }
  Block& block = *blocks_[rank];
  if (block.alive == 0) {
    fail("the shared memory of block " + std::to_string(rank) +
         " of the cluster is accessed after the block has ended");
  }
  return block;
}

// A fiber never returns: an error ends the launch, and its stack is then reused as it is.
void Machine::enter() {
  Thread& thread = *machine().current_;
  try {
    machine().kernel_();
    machine().finish(thread);
  } catch (...) {
    machine().error_ = std::current_exception();
  }
  for (;;) thread.fiber.suspend();
}

void Machine::finish(Thread& thread) {
  Warp& warp = *thread.warp;
  thread.finished = true;
  finish_copies(thread, 0);
  for (const AsyncCopy& copy : thread.copies) copy_sixteen(copy);
  if (warp.arrived > 0) {
    fail("divergence: a thread has ended while others of its warp wait at " +
         warp.operation.describe());
  }
  --alive_;
  --warp.block->alive;
  if (--warp.alive == 0 && !warp.products.idle()) {
    fail("a warp has ended before it waited for its wgmma");
  }
  release_cluster();
}

void Machine::wait(const Operation& operation) {
  Thread& thread = *current_;
  thread.waits_for = operation;
  thread.blocked = true;
  while (thread.blocked) thread.fiber.suspend();
}

void Machine::wake(Thread& thread) {
  thread.blocked = false;
  if (&thread == current_) return;
  Warp& warp = *thread.warp;
  if (warp.ready == 0) ready_.push_back(&warp);
  warp.ready |= uint32_t(1) << thread.lane;
}

void Machine::arrive_at(const Operation& operation, void* argument) {
  Thread& self = *current_;
  Warp& warp = *self.warp;
  if (warp.alive < kWarp) {
    fail("divergence: " + operation.describe() + " after threads of the warp have ended");
  }
  if (warp.arrived == 0) warp.operation = operation;
  if (!(warp.operation == operation)) {
    fail("divergence: one lane is at " + operation.describe() + ", another of its warp at " +
         warp.operation.describe());
  }
  warp.arguments[self.lane] = argument;
  ++warp.arrived;
  self.waits_for = operation;
  self.blocked = true;
}

void Machine::release(Warp& warp) {
  for (Thread& thread : warp.lanes) wake(thread);
}

void Machine::cluster_arrive(Warp& warp) {
  cluster_waiting_.push_back(&warp);
  release_cluster();
}

// A barrier of the cluster counts the threads that have not ended.
void Machine::release_cluster() {
  if (static_cast<int>(cluster_waiting_.size()) * kWarp != alive_) return;
  for (Warp* warp : std::exchange(cluster_waiting_, {})) release(*warp);
}

// ---- the copy engine --------------------------------------------------------------------------

void Machine::issue(const BoxCopy& box) {
  if (adversary_.orderly()) return copy(box);
  std::memset(box.block->shared + box.to, kPoison, box.map.box_rows * 128);
  boxes_.push_back(box);
}

bool Machine::copy_any_box() {
  if (boxes_.empty()) return false;
  const std::size_t chosen = adversary_.below(boxes_.size());
  const BoxCopy box = boxes_[chosen];
  boxes_.erase(boxes_.begin() + chosen);
  copy(box);
  return true;
}

void Machine::copy(const BoxCopy& box) {
  const device::TensorMap& map = box.map;
  for (int i = 0; i < map.box_rows; ++i) {
    const bool inside = box.row + i < map.rows;
    const char* from = map.base + (int64_t(box.row) + i) * map.row_bytes;
    for (int column = 0; column < 64; column += 8) {
      const int64_t first = int64_t(box.column) + column;
      const int64_t valid = inside ? std::clamp<int64_t>(map.columns - first, 0, 8) : 0;
      char* to = box.block->shared + swizzle(box.to + 128 * i + 2 * column);
      if (valid > 0) std::memcpy(to, from + 2 * first, 2 * valid);
      std::memset(to + 2 * valid, 0, 16 - 2 * valid);
    }
  }
  bring(box.block->barrier(box.barrier), map.box_rows * 128);
}

// ---- the scheduler ----------------------------------------------------------------------------

void Machine::run_cluster(unsigned x, unsigned y) {
  ready_.clear();
  for (std::size_t rank = 0; rank < blocks_.size(); ++rank) {
    Block& block = *blocks_[rank];
    block.start(x, y + static_cast<unsigned>(rank), static_cast<int>(rank), &Machine::enter);
    alive_ += block.alive;
    for (Warp& warp : block.warps) ready_.push_back(&warp);
  }
  if (!adversary_.orderly()) preference_ = static_cast<Preference>(adversary_.below(3));
  do {
    while (!ready_.empty()) {
      run(take_ready());
      if (!boxes_.empty() && !adversary_.late()) copy_any_box();
    }
  } while (alive_ > 0 && copy_any_box());
  check_end();
}

Warp& Machine::take_ready() {
  std::size_t chosen = 0;
  if (preference_ == Preference::kNewest) chosen = ready_.size() - 1;
  if (preference_ == Preference::kAny) chosen = adversary_.below(ready_.size());
  Warp& warp = *ready_[chosen];
  ready_.erase(ready_.begin() + chosen);
  return warp;
}

// Any odd stride leads through all lanes.
void Machine::run(Warp& warp) {
  const uint32_t lanes = std::exchange(warp.ready, 0);
  const uint64_t first = adversary_.orderly() ? 0 : adversary_.below(kWarp);
  const uint64_t stride = adversary_.orderly() ? 1 : 2 * adversary_.below(kWarp / 2) + 1;
  for (int i = 0; i < kWarp; ++i) {
    const uint64_t lane = (first + i * stride) % kWarp;
    if (lanes >> lane & 1) resume(warp.lanes[lane]);
  }
}

void Machine::resume(Thread& thread) {
  const Warp& warp = *thread.warp;
  threadIdx = {static_cast<unsigned>(warp.index * kWarp + thread.lane), 0, 0};
  blockIdx = {warp.block->x, warp.block->y, 0};
  current_ = &thread;
  thread.fiber.resume();
  current_ = nullptr;
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Machine::check_end() const {
  if (alive_ > 0) throw std::runtime_error(deadlock());
  if (!boxes_.empty()) fail("a block has ended while the copy of a box is under way");
  for (const auto& block : blocks_) block->check_end();
}

std::string Machine::deadlock() const {
  std::map<std::string, int> counts;
  for (const auto& block : blocks_) {
    for (const Warp& warp : block->warps) {
      for (const Thread& thread : warp.lanes) {
        if (!thread.finished) ++counts[thread.waits_for.describe()];
      }
    }
  }
  std::string text = "deadlock: ";
  for (const auto& [operation, count] : counts) {
    if (text.back() != ' ') text += ", ";
    text += std::to_string(count) + " threads at " + operation;
  }
  const Block& first = *blocks_.front();
  return text + " (cluster of block " + tuple(first.x, first.y) + ").";
}

}  // namespace grasp::emulator
