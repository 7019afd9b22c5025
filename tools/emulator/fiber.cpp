#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

namespace {

constexpr std::size_t kStack = 128 << 10;
constexpr std::size_t kGuard = 4 << 10;

// Stacks are kept for the next launch: mapping them anew costs more than most kernels.
std::vector<char*>& free_stacks() {
  static std::vector<char*> stacks;
  return stacks;
}

char* take_stack() {
  if (!free_stacks().empty()) {
    char* stack = free_stacks().back();
    free_stacks().pop_back();
    return stack;
  }
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuard, PROT_NONE);  // an overflow faults instead of changing another thread
  return static_cast<char*>(memory);
}

}  // namespace

namespace grasp::emulator {

Fiber::Fiber() : stack_(take_stack()) {}

Fiber::~Fiber() { free_stacks().push_back(stack_); }

}  // namespace grasp::emulator

#if defined(GRASP_EMULATOR_UCONTEXT)

namespace grasp::emulator {

void Fiber::start(void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStack;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::resume() { swapcontext(&resumer_, &context_); }

void Fiber::suspend() { swapcontext(&context_, &resumer_); }

}  // namespace grasp::emulator

#else

// swapcontext asks the kernel for the signal mask each time; this keeps the registers that a call
// preserves, and nothing else.
extern "C" void grasp_emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden grasp_emulator_switch
.globl grasp_emulator_switch
.type grasp_emulator_switch, @function
grasp_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size grasp_emulator_switch, .-grasp_emulator_switch
)");

namespace grasp::emulator {

void Fiber::start(void (*entry)()) {
  // As if `entry` had been called and grasp_emulator_switch had then been called at its beginning:
  // six registers, the address to go on at, and the return address that `entry` never uses.
  auto* top = reinterpret_cast<uint64_t*>(stack_ + kStack);
  for (int i = 1; i <= 8; ++i) top[-i] = 0;
  top[-2] = reinterpret_cast<uint64_t>(entry);
  context_ = top - 8;
}

void Fiber::resume() { grasp_emulator_switch(&resumer_, context_); }

void Fiber::suspend() { grasp_emulator_switch(&context_, resumer_); }

}  // namespace grasp::emulator

#endif
