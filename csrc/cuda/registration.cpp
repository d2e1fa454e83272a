// The module hitsr_fast._C_cuda. Like _C it declares no op; the sources beside it register what they implement.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["targets"] = HITSR_FAST_CUDA_TARGETS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "CUDA backends of hitsr_fast.";
  module.def("build_info", &build_info, "What this module was built with: torch, cuda, targets.");
}
