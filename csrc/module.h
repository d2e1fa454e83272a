// A Python module on the limited API that registers ops as it is loaded. It has one function, build_info().
#pragma once

#include <Python.h>

inline PyObject* make_module(const char* name, const char* doc, PyCFunction build_info) {
  static PyMethodDef methods[] = {
      {"build_info", build_info, METH_NOARGS, "What this module was built with."}, {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, name, doc, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
