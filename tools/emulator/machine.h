// The threads of one cluster, each a fiber, and the order in which they run.
//
// Everything here belongs to the one launch under way; a mutex in `launch` sees to that.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device/host.h"
#include "fiber.h"
#include "products.h"

namespace grasp::emulator {

constexpr int kWarp = 32;
constexpr int kPoison = 0xff;  // bytes of NaNs, in every type of element

// Throws, naming the thread that is running.
[[noreturn]] void fail(const std::string& what);

// What a thread does in company: lanes of a warp must do the same, and a deadlock names it.
struct Operation {
  const char* name;
  int details = 0;
  std::array<int64_t, 3> detail = {};

  bool operator==(const Operation& other) const;
  std::string describe() const;
};

// Decides what CUDA leaves open.
class Adversary {
 public:
  explicit Adversary(uint64_t seed) : seed_(seed), state_(seed) {}

  bool orderly() const { return seed_ == 0; }
  uint64_t below(uint64_t bound);
  // Whether asynchronous work that is being issued is done as late as it may be.
  bool late();

 private:
  uint64_t seed_, state_;
};

struct AsyncCopy {
  char* to;
  const char* from;
  bool valid;
};

struct Warp;

struct Thread {
  Fiber fiber;
  Warp* warp = nullptr;
  int lane = 0;
  bool blocked = false, finished = false;
  Operation waits_for;
  std::vector<AsyncCopy> copies;  // not yet in a group
  std::deque<std::vector<AsyncCopy>> groups;
};

struct Block;

struct Warp {
  Block* block = nullptr;
  int index = 0;
  int alive = 0;
  int registers = 0;   // of a thread
  uint32_t ready = 0;  // a bit for each lane that can run
  int arrived = 0;     // lanes, at `operation`
  Operation operation;
  std::array<void*, kWarp> arguments = {};  // of the operation, one a lane
  std::array<Thread, kWarp> lanes;
  Products products;
};

// An mbarrier: the phase under way ends when nothing is pending.
struct Phases {
  int count;
  int arrivals;       // pending
  int64_t bytes = 0;  // pending; negative while copies are ahead of their announcement
  int parity = 0;
  std::vector<Thread*> waiting;
};

// A warp that waits until the block has so many registers left over for each of its threads.
struct Claim {
  Warp* warp;
  int registers;
};

struct NamedBarrier {
  int threads = 0;
  std::vector<Warp*> waiting;
};

struct Block {
  Block(int threads, int shared_bytes);

  void start(unsigned x, unsigned y, int rank, void (*entry)());
  // The offset of what a primitive accesses, which must lie inside of the shared memory.
  uint32_t offset(const void* shared, std::size_t bytes, std::size_t alignment) const;
  void init_barrier(uint32_t offset, int arrivals);
  Phases& barrier(uint32_t offset);
  void give_registers(Warp& warp, int count);
  void take_registers(Warp& warp, int count);
  void check_end() const;

  char* shared;
  int shared_bytes;
  unsigned x = 0, y = 0;
  int rank = 0;
  int alive = 0;
  std::vector<Warp> warps;
  std::map<uint32_t, Phases> barriers;
  std::array<NamedBarrier, 16> named;
  std::vector<IssueOrder> issued;  // by the warps of each warpgroup

 private:
  void serve_claims();
  void check_groups() const;

  int spare_registers_ = 0;  // of a warp's thread
  std::vector<Claim> claims_;
  std::vector<char> memory_;
};

// A copy of a box that is under way.
struct BoxCopy {
  device::TensorMap map;
  Block* block;
  uint32_t to, barrier;
  int column, row;
};

class Machine {
 public:
  Machine(const device::Grid& grid, const std::function<void()>& kernel, Adversary& adversary);
  ~Machine();

  void run_cluster(unsigned x, unsigned y);

  Thread* current() const { return current_; }
  Block& block(int rank);
  Adversary& adversary() { return adversary_; }

  // The current thread stops until another wakes it.
  void wait(const Operation& operation);
  void wake(Thread& thread);

  // Waits until all lanes of the warp have come to the same operation. The last to come acts on the
  // arguments of all; where `act` returns false, the lanes go on waiting.
  template <typename Act>
  void meet(const Operation& operation, void* argument, Act act);
  void release(Warp& warp);

  void issue(const BoxCopy& copy);
  void copy(const BoxCopy& box);

  void cluster_arrive(Warp& warp);

 private:
  static void enter();
  void arrive_at(const Operation& operation, void* argument);
  void finish(Thread& thread);
  void release_cluster();
  Warp& take_ready();
  void run(Warp& warp);
  void resume(Thread& thread);
  bool copy_any_box();
  void check_end() const;
  std::string deadlock() const;

  enum class Preference { kAny, kOldest, kNewest };

  const std::function<void()>& kernel_;
  Adversary& adversary_;
  Preference preference_ = Preference::kOldest;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Warp*> ready_;
  std::vector<Warp*> cluster_waiting_;
  std::vector<BoxCopy> boxes_;
  int alive_ = 0;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
};

// The one of the launch under way.
Machine& machine();

inline Thread& current() { return *machine().current(); }

// Arrivals and bytes change what is pending, and with nothing pending the phase ends.
void arrive(Phases& barrier);
void bring(Phases& barrier, int64_t bytes);

void finish_copies(Thread& thread, std::size_t pending);

// Bits 4 to 6 of an address are those of the 16-byte chunk in its row; the 128-byte swizzle
// permutes the chunks of a row by its index among eight, bits 7 to 9.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

template <typename Act>
void Machine::meet(const Operation& operation, void* argument, Act act) {
  Thread& self = *current_;
  Warp& warp = *self.warp;
  arrive_at(operation, argument);
  if (warp.arrived == kWarp) {
    warp.arrived = 0;
    if (act(warp)) release(warp);
  }
  if (self.blocked) wait(operation);
}

}  // namespace grasp::emulator
