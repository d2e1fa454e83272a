// The module hitsr_fast._C_cuda. Like _C it declares no public op; the sources beside it register what they implement.
#include <torch/headeronly/version.h>

#include <string>

#include <cuda_runtime_api.h>

#include "module.h"

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  const std::string cuda = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return Py_BuildValue(
      "{s:s,s:s,s:s}", "torch", TORCH_VERSION, "cuda", cuda.c_str(), "targets", HITSR_FAST_CUDA_TARGETS);
}

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return make_module("_C_cuda", "CUDA backends of hitsr_fast.", build_info); }
