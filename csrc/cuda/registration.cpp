// The module hitsr_fast._C_cuda. Like _C it declares no op; the sources beside it register what they implement.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/headeronly/version.h>

#include <string>

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  const std::string cuda = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return Py_BuildValue(
      "{s:s,s:s,s:s}", "torch", TORCH_VERSION, "cuda", cuda.c_str(), "targets", HITSR_FAST_CUDA_TARGETS);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this module was built with: torch, cuda, targets."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA backends of hitsr_fast.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&definition); }
