// Errors: one sentence, without the place in the sources that torch's own checks put before it.

#pragma once

#include <sstream>
#include <stdexcept>

namespace grasp {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

}  // namespace grasp

// A macro, so that the sentence is only made when it is needed.
#define GRASP_CHECK(condition, ...) \
  do {                              \
    if (!(condition)) {             \
      ::grasp::refuse(__VA_ARGS__); \
    }                               \
  } while (false)
