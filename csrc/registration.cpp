// The module hitsr_fast._C, on Python's limited API. It declares no op: schemas live in Python (hitsr_fast/ops), and the
// sources in cpu/ register what they implement as private ops when this library is loaded.
#include <Python.h>
#include <torch/headeronly/version.h>

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

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this module was built with: torch, compiler, cxx_standard."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled backends of hitsr_fast.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
