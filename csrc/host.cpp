// The host-side module grasp_kernels._host: what this build of the extension is.
// It links to neither torch nor CUDA, so it loads wherever Python does.

#include <pybind11/pybind11.h>

#include <string>

#ifndef GRASP_VERSION
#error "setup.py defines GRASP_VERSION"
#endif

namespace {

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
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Build information of the compiled extension of grasp_kernels.";
  module.def("build_info", &build_info,
             "Version, compiler, C++ standard and Python version this extension was built with.");
}
