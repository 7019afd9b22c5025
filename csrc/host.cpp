// The host-side module grasp_kernels._host: what this build of the extension is, and what the
// compiler said of every kernel. It links to neither torch nor CUDA, so it loads wherever Python
// does.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#if defined(__GNUG__)
#include <cxxabi.h>
#endif

#include "grasp_built.h"  // made by the build
#include "kernels/finish.h"
#include "kernels/shapes.h"

namespace {

// One kernel's machine code for one architecture, as ptxas reports it.
struct Compiled {
  const char* symbol;
  const char* architecture;
  int registers;
  int local_memory;  // bytes a thread
  int spilled;
  int shared_memory;  // static, bytes a block
};

const std::vector<Compiled> kCompiled = {GRASP_KERNELS};
const std::vector<const char*> kArchitectures = {GRASP_ARCHITECTURES};

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = GRASP_VERSION;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["python"] = PY_VERSION;
  info["nvcc"] = pybind11::none();
  if (*GRASP_NVCC != '\0') info["nvcc"] = GRASP_NVCC;
  pybind11::list architectures;
  for (const char* name : kArchitectures) architectures.append(name);
  info["architectures"] = architectures;
  info["torch_abi"] = GRASP_TORCH_ABI;
  return info;
}

std::string demangled(const char* symbol) {
#if defined(__GNUG__)
  int failed = 0;
  char* found = abi::__cxa_demangle(symbol, nullptr, nullptr, &failed);
  std::string name = failed ? symbol : found;
  std::free(found);
  return name;
#else
  return symbol;
#endif
}

void replace_all(std::string& text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
}

// pass_kernel<bf16, 7>, from the name that the linker knows.
std::string short_name(const char* symbol) {
  std::string name = demangled(symbol);
  name = name.substr(0, name.find('('));
  if (name.rfind("void ", 0) == 0) name = name.substr(5);
  const std::pair<const char*, const char*> replacements[] = {
      {"torch::headeronly::", ""}, {"c10::", ""},   {"grasp::", ""}, {"device::", ""},
      {"BFloat16", "bf16"},        {"Half", "fp16"}};
  for (const auto& [from, to] : replacements) replace_all(name, from, to);
  return name;
}

// The shape that a kernel of this name is compiled for, or null: its last template argument.
const grasp::Shape* shape_of(const std::string& name) {
  const size_t comma = name.rfind(", ");
  if (name.rfind("pass_kernel<", 0) != 0 || comma == std::string::npos) return nullptr;
  const int index = std::atoi(name.c_str() + comma + 2);
  return 0 <= index && index < grasp::kShapes ? &grasp::SHAPES[index] : nullptr;
}

std::string described(const grasp::Shape& shape) {
  const char* kinds[] = {"gradient", "input", "down"};
  std::string text = kinds[static_cast<int>(shape.kind)];
  if (shape.sums()) text += " R=" + std::to_string(shape.R);
  if (shape.skinny()) text += " E=" + std::to_string(shape.E);
  return text;
}

// Whether this architecture has a body for the shape; primitives.cuh decides it in the same way.
bool made_for(const grasp::Shape& shape, const std::string& architecture) {
  return shape.arch == (architecture == "sm_90a" ? 90 : 80);
}

// Most threads of a block: what the kernel's launch bounds say, else those that have registers.
int max_threads(const std::string& name, const grasp::Shape* shape, int registers) {
  if (shape != nullptr) return shape->threads();
  if (name.rfind("finish_kernel", 0) == 0) return grasp::kFinishThreads;
  const int each = std::max(8, (registers + 7) / 8 * 8);
  return std::min(1024, 65536 / each / 32 * 32);
}

pybind11::list kernels() {
  pybind11::list found;
  for (const Compiled& compiled : kCompiled) {
    const std::string name = short_name(compiled.symbol);
    const grasp::Shape* shape = shape_of(name);
    if (shape != nullptr && !made_for(*shape, compiled.architecture)) continue;
    pybind11::dict kernel;
    kernel["name"] = name;
    kernel["shape"] = shape == nullptr ? "" : described(*shape);
    kernel["arch"] = compiled.architecture;
    kernel["registers"] = compiled.registers;
    kernel["local_memory"] = compiled.local_memory;
    kernel["spilled"] = compiled.spilled;
    kernel["shared_memory"] =
        compiled.shared_memory + (shape == nullptr ? 0 : shape->shared_memory());
    kernel["max_threads"] = max_threads(name, shape, compiled.registers);
    found.append(kernel);
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "What the compiled parts of grasp_kernels are and what their kernels take.";
  module.def("build_info", &build_info,
             "Version, compiler, C++ standard and Python version this extension was built with; of "
             "the CUDA kernels nvcc (None without them), architectures and torch's ABI.");
  module.def("kernels", &kernels,
             "Every CUDA kernel for every architecture: registers, local memory and spills of a "
             "thread, shared memory and most threads of a block.");
}
