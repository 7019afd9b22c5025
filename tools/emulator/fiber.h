// A function on a stack of its own, that runs until it suspends itself.

#pragma once

#if !defined(__x86_64__)
#define GRASP_EMULATOR_UCONTEXT 1
#endif

#if defined(GRASP_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace grasp::emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume enters `entry`, which must not return; what ran before is forgotten.
  void start(void (*entry)());
  void resume();
  void suspend();

 private:
  char* stack_;
#if defined(GRASP_EMULATOR_UCONTEXT)
  ucontext_t context_;
  ucontext_t resumer_;
#else
  void* context_ = nullptr;
  void* resumer_ = nullptr;
#endif
};

}  // namespace grasp::emulator
