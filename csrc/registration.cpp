// The module hitsr_fast._C. It declares no public op: schemas live in Python (hitsr_fast/ops), and the sources in cpu/
// register what they implement as private ops.
#include <torch/headeronly/version.h>

#include "module.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue(
      "{s:s,s:s,s:l}", "torch", TORCH_VERSION, "compiler", kCompiler, "cxx_standard", static_cast<long>(__cplusplus));
}

}  // namespace

PyMODINIT_FUNC PyInit__C() { return make_module("_C", "Compiled backends of hitsr_fast.", build_info); }
