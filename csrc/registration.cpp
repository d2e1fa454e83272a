// The module hitsr_fast._C. It declares no op: schemas live in Python (hitsr_fast/ops), and the sources in cpu/ and
// cuda/ register what they implement as private ops when this library is loaded.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "check.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = kCompiler;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled backends of hitsr_fast.";
  module.def("build_info", &build_info, "What this module was built with: torch, compiler, cxx_standard.");
}
